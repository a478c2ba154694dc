"""One kernel where DeepSpeed's ZeRO-1 and ZeRO-2 wrappers launch one for every parameter.

``BF16_Optimizer`` and ``DeepSpeedZeroOptimizer`` add up, copy and measure gradients tensor by
tensor: some hundred launches and as many passes through Python in every update, in which a GPU
waits. What is put in their place does the same for all tensors of a group at once. It replaces
methods of one optimizer object, after a check that it is of the kind whose code they follow
(DeepSpeed 0.19.8); any other keeps DeepSpeed's own. Weights stay bitwise what they were on the
CPU; gradient norms differ by rounding (docs/dev/deepspeed-notes.md).
"""

from __future__ import annotations

from typing import Any

from megalr.engine.patch_bf16 import batch_bf16
from megalr.engine.patch_zero import batch_zero


def batch_parameters(engine: Any) -> None:
    """Replace what the engine's wrapper does for every parameter by itself, where it can be.

    Call it once, before the first update. Does nothing with any other wrapper, with
    mixture-of-experts layers, and with optimizer states that DeepSpeed offloads.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if getattr(optimizer, "has_moe_layers", False):
        return
    if isinstance(optimizer, BF16_Optimizer):
        batch_bf16(engine, optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        batch_zero(optimizer)
