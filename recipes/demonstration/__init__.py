"""The two halves of ``make demo``: a network that goes on learning, and residual blocks that change places."""
