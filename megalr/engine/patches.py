"""Replaced methods of DeepSpeed's optimizer wrappers: one kernel per group, not one per parameter.

DeepSpeed's optimizer wrappers accumulate, copy and measure gradients tensor by tensor, and ZeRO 3
gathers and frees weights so: hundreds of launches and as many passes through Python in every
update, while the GPU waits. The replacements do the same for all tensors of a group at once. They
are methods of one optimizer object, installed only for the version of DeepSpeed whose code they
follow, only if the object has every attribute that they use, and not with features that they do not
know; otherwise DeepSpeed's own code runs.

================ ================================= ===============================================
file             follows                           recorded gain in tokens/s, one H200
================ ================================= ===============================================
patch_bf16.py    ``BF16_Optimizer`` 0.19.8         ZeRO 1: 20 % at 60M, 10 % at 1B, 4.3 GiB less
patch_zero.py    ``DeepSpeedZeroOptimizer`` 0.19.8 ZeRO 2: 69 % at 60M, 92 % at 350M, 28 % at 1B
patch_zero.py    the same, ZeRO 2 with offload     not measured: the host waits once an update, not
                                                   twice for each parameter
patch_zero3.py,  ``DeepSpeedZeroOptimizer_Stage3`` not measured on a GPU yet: these methods take
patch_gathers.py and its parameter coordinator     the host 32 to 45 % of DeepSpeed's time, on a CPU
                 0.19.8
================ ================================= ===============================================

Measured in benchmarks/lab/patches.md.

Test: tests/engine/test_patches.py compares every update with DeepSpeed's own code: weights, masters
and moments are bitwise the same on a CPU until an update is clipped; norms differ by rounding.

Removal: when :data:`FOLLOWS` is raised, delete a patch whose gain the new version of DeepSpeed has
by itself (``benchmarks/throughput.py`` with and without), and read the new code against the others.
"""

from __future__ import annotations

from typing import Any

from megalr.distributed.agreement import is_rank0
from megalr.engine.patch_bf16 import batch_bf16
from megalr.engine.patch_zero import batch_offload, batch_zero
from megalr.engine.patch_zero3 import batch_zero3
from megalr.engine.wrappers import BF16, ZeRO3, ZeRO12, wrapper_of

FOLLOWS = "0.19.8"
"""The version of DeepSpeed whose code the replacements follow."""


def batch_parameters(engine: Any) -> None:
    """Replace what the engine's wrapper does parameter by parameter, where a replacement exists.

    Call it once, before the first update. Does nothing with another version of DeepSpeed, any other
    wrapper, or mixture-of-experts layers.
    """
    import deepspeed

    wrapper, optimizer = wrapper_of(engine), engine.optimizer
    if getattr(optimizer, "has_moe_layers", False):
        return
    if not isinstance(wrapper, BF16 | ZeRO12 | ZeRO3):
        return
    if deepspeed.__version__.split("+")[0] != FOLLOWS:
        if is_rank0():
            print(
                f"note: DeepSpeed {deepspeed.__version__} is not {FOLLOWS}, whose optimizer code "
                "megalr can replace by a faster one: updates are the same, and take longer",
                flush=True,
            )
        return
    if isinstance(wrapper, BF16):
        batch_bf16(engine, optimizer)
    elif isinstance(wrapper, ZeRO3):
        batch_zero3(engine, optimizer)
    elif optimizer.cpu_offload:
        batch_offload(optimizer)
    else:
        batch_zero(optimizer)
