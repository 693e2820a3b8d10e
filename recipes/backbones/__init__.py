"""Public pretrained networks for experiments on real weights; nothing here is part of the package."""
