"""The optimizer around an optimizer, its checkpoint, and how it comes to know its populations.

In: an optimizer and a model. Out: the same optimizer, under whose steps units die and are born.
How populations are proven and who dies is not known here.
"""
