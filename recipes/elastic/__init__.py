"""One training, many depths: blocks go by the size of their steps, beside networks trained at every depth.

In: images. Out: error against the number of blocks that are kept, for each way to train.
"""
