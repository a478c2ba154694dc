"""Clipping and skipping where DeepSpeed puts no wrapper: float32 and paper_bf16 without ZeRO.

There the engine's optimizer is the run's own and updates the model's weights. DeepSpeed would make
the step with a NaN gradient too, so this replaces the optimizer's ``step`` whatever the version of
DeepSpeed; tests/engine/test_unwrapped_step.py compares it with a loop of plain torch. torch's fused
AdamW clips inside its kernel, which costs no pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalr.engine.skip_step import step_or_skip
from megalr.models.decoder import Decoder
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.collectives import all_reduce


def without_accumulation_dtype(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration without the dtype in which gradients are accumulated.

    DeepSpeed takes the weights for float32 where its bf16 mode is off and refuses any other dtype;
    without a wrapper gradients are accumulated in ``.grad``, in the dtype of the weights.
    """
    return {key: value for key, value in ds_config.items() if key != "data_types"}


def install_clip_and_skip(engine: Any) -> None:
    """Make the optimizer's ``step`` clip, and change nothing if the gradient is not finite.

    It leaves the norm before clipping where the engine looks for it (``_global_grad_norm``). On one
    data-parallel rank the engine's all-reduce, which copies every gradient twice, is turned off.
    """
    optimizer, decoder, limit = engine.optimizer, engine.module, engine.gradient_clipping()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    original_step = optimizer.step

    def clip(norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def step() -> None:
        norm = optimizer._global_grad_norm = gradient_norm(decoder)
        step_or_skip(optimizer, norm, limit, clip, original_step)

    optimizer.step = step
    engine.clip_fp32_gradients = lambda: None  # DeepSpeed's own, kernel by kernel
    if engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False


def gradient_norm(decoder: Decoder) -> Tensor:
    """Global norm of the gradients in ``.grad``; over tensor-parallel ranks, each number once.

    Float32 also for bf16 gradients, whose norms torch's own function rounds to 8 bits.
    """
    mesh = decoder.plan.mesh
    gradients = [
        p.grad
        for p in decoder.parameters()
        if p.grad is not None and (shard_of(p) is not None or mesh.tensor_rank == 0)
    ]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if mesh.tensor_group is None:
        return norm
    return all_reduce(norm.square(), mesh.tensor_group).sqrt()
