"""Networks that must go on learning: streams of tasks, the methods made for them, and one table for all.

In: images. Out: accuracy over tasks, for this package's optimizer beside the bare one and its peers.
"""
