"""Training recipes, run as scripts (``python recipes/cifar.py``); a package so that tests can import the parts."""
