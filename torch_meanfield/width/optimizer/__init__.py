"""The optimizer around an optimizer, its checkpoint, and how it comes to know its populations."""
