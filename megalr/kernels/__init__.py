"""Kernels of our own for GPUs; each has a plain PyTorch twin that computes the same."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the kernels can be compiled; torch for CUDA brings Triton."""
