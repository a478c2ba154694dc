"""Updates without a wrapper of DeepSpeed's: float32 and paper_bf16 without ZeRO.

There the engine's optimizer is the run's own and works on the model's weights. What the wrappers do
around its step is done here: the gradient norm, clipping, and leaving a bad update out on all
ranks. torch's fused AdamW clips and leaves out inside its kernel, so the host does not wait for the
norm before it launches the step, and clipping costs no pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalr.engine.skip_step import not_finite_anywhere, step_with_found_inf, supports_device_skip
from megalr.models.decoder import Decoder
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.collectives import all_reduce


def as_deepspeed_takes_it(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration without the dtype that gradients add up in.

    DeepSpeed believes that weights are float32 where its bf16 mode is off and refuses any other
    dtype; without a wrapper they add up in ``.grad``, in the dtype of the weights.
    """
    return {key: value for key, value in ds_config.items() if key != "data_types"}


def install_clip_and_skip(engine: Any) -> None:
    """Let the optimizer's ``step`` clip, and change nothing where the gradient is not finite.

    It leaves the norm before clipping and whether it changed nothing where the engine looks for
    them in its wrappers (``_global_grad_norm``, ``overflow``); the latter on the device, in
    ``skipped``, where the host has not waited for it. The clipped gradient is
    g / max(1, (norm + 1e-6) / c) with c of ``train.gradient_clipping``, as torch's. On one
    data-parallel rank the engine's all-reduce, which copies every gradient twice, is turned off.
    """
    optimizer, decoder, limit = engine.optimizer, engine.module, engine.gradient_clipping()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    make_step = optimizer.step

    def step() -> None:
        norm = gradient_norm(decoder)
        bad = not_finite_anywhere(norm)
        optimizer._global_grad_norm, optimizer.overflow, optimizer.skipped = norm, False, bad
        if supports_device_skip(optimizer):
            step_with_found_inf(optimizer, bad, norm, limit, make_step)
            return
        optimizer.overflow = optimizer.skipped = bool(bad)
        if optimizer.overflow:
            return
        if limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        make_step()

    optimizer.step = step
    engine.clip_fp32_gradients = lambda: None  # DeepSpeed's own, kernel by kernel
    if engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False


def gradient_norm(decoder: Decoder) -> torch.Tensor:
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
