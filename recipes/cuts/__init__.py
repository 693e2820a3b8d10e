"""A cut network fine-tuned: residual blocks by each criterion, channels at the same latency, and a smaller sibling.

In: a public network, adapted to images once. Out: its error after the same fine-tuning of everything that is as fast.
"""
