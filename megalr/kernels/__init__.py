"""Kernels of our own for GPUs; each has a plain PyTorch twin that computes the same."""
