"""Image classification: data sets, augmentation, the training task and its command line."""
