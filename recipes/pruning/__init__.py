"""Depth after training as a command: what is removed, what becomes of it, and the proof that plain timm runs it.

In: a trained timm model and data. Out: a plain network of fewer blocks, with its errors and latencies.
"""
