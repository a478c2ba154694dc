"""Where the kernels are tested: on a GPU, or on the CPU by Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from megalr.kernels import HAS_TRITON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

HALF = torch.float16 if INTERPRETED else torch.bfloat16
"""For products: the interpreter's of bfloat16 are wrong."""

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (torch.cuda.is_available() or INTERPRETED),
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1",
)
