"""One script for each part of the theory: the prediction, a network that was measured beside it, one picture."""
