"""Experiments on birth and death, one script each: ``python recipes/births/NAME.py``."""
