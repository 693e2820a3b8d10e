"""Controlled comparisons on public pretrained networks: every arm sees the same weights, batches and images."""
