"""Replacements for methods of ``BF16_Optimizer``: bf16 with ZeRO 1, accumulation in float32.

Version, gain, test and rule for removal: :mod:`megalr.engine.patches`.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from megalr.engine.skip_step import step_or_skip

_ATTRIBUTES = (
    "bf16_groups fp32_groups_gradients fp32_groups_gradients_flat fp32_groups_has_gradients "
    "fp32_groups_gradient_flat_partition fp32_groups_flat_partition update_hp_grads clear_hp_grads "
    "clear_lp_grads get_grads_for_norm get_grads_for_reduction update_lp_params clip_grad "
    "_lazy_init_hp_params_optimizer_state _uses_muon immediate_grad_update norm_type mpu"
)


def batch_bf16(engine: Any, optimizer: Any) -> None:
    """Replace methods of the engine's ``BF16_Optimizer`` if it is used in the usual way."""
    as_expected = (
        all(hasattr(optimizer, name) for name in _ATTRIBUTES.split())
        and not optimizer._uses_muon
        and not optimizer.immediate_grad_update
        and optimizer.norm_type == 2
        and optimizer.grad_acc_dtype == torch.float32
        and getattr(optimizer, "autoep_folding_tp_group", None) is None
    )
    if not as_expected:
        return
    # Sums in the shapes of the gradients: a batched copy wants equal shapes.
    sums = [
        [total.view(p.shape) for total, p in zip(totals, group, strict=True)]
        for totals, group in zip(
            optimizer.fp32_groups_gradients, optimizer.bf16_groups, strict=True
        )
    ]
    original = optimizer.update_hp_grads

    def update_hp_grads(self: Any, clear_lp_grads: bool = False) -> None:
        if clear_lp_grads:
            for number, has_gradient in enumerate(self.fp32_groups_has_gradients):
                if not any(has_gradient):
                    self.fp32_groups_gradients_flat[number].zero_()
            original(clear_lp_grads)
            return
        for number, group in enumerate(self.bf16_groups):
            _add_gradients(self, number, group, sums[number])

    optimizer.update_hp_grads = MethodType(update_hp_grads, optimizer)
    optimizer.clear_hp_grads = MethodType(_forget_sums, optimizer)
    optimizer.step = MethodType(_bf16_step, optimizer)
    if dist.get_world_size(engine.seq_data_parallel_group) == 1:
        low = engine.communication_data_type
        rounds = low != torch.float32 and engine.gradient_accumulation_steps() > 1
        _reduce_on_one_rank(optimizer, low if rounds else None)


def _forget_sums(optimizer: Any) -> None:
    """``clear_hp_grads`` without writing zeros: the next micro-batch writes over the sums."""
    groups = optimizer.fp32_groups_gradients
    optimizer.fp32_groups_has_gradients[:] = [[False] * len(group) for group in groups]


@torch.no_grad()
def _add_gradients(optimizer: Any, number: int, group: list[Any], sums: list[Tensor]) -> None:
    """``sums += .grad`` for a group's parameters, bf16 onto float32.

    The first micro-batch of an update is written over the sums of the last (one kernel for some
    hundred tensors, and the sums are neither cleared nor read); later ones are gathered into one
    bf16 tensor and added to the flat sums by one more kernel.
    """
    has_gradient = optimizer.fp32_groups_has_gradients[number]
    used = [index for index, parameter in enumerate(group) if parameter.grad is not None]
    if not any(has_gradient):
        if len(used) < len(group):
            torch._foreach_zero_([sums[i] for i in set(range(len(group))).difference(used)])
        if used:
            torch._foreach_copy_([sums[i] for i in used], [group[i].grad for i in used])
    elif len(used) == len(group):
        gathered = torch.cat([parameter.grad.reshape(-1) for parameter in group])
        optimizer.fp32_groups_gradients_flat[number][: gathered.numel()].add_(gathered)
    else:
        for index in used:
            sums[index].add_(group[index].grad)
    for index in used:
        group[index]._hp_grad = optimizer.fp32_groups_gradients[number][index]
        has_gradient[index] = True


def _reduce_on_one_rank(optimizer: Any, rounds_to: torch.dtype | None) -> None:
    """Leave the engine nothing to reduce where there is one data-parallel rank.

    It would flatten all sums, convert them to ``communication_data_type`` and copy them back twice
    (28 bytes per parameter) to add up nothing. The rounding to that type stays where several
    micro-batches were added up: the sums of one are of that type already.
    """

    def get_grads_for_reduction(self: Any) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        if rounds_to is not None:
            for flat in self.fp32_groups_gradients_flat:
                flat.copy_(flat.to(rounds_to))
        return [], {}

    optimizer.get_grads_for_reduction = MethodType(get_grads_for_reduction, optimizer)


@torch.no_grad()
def _bf16_step(optimizer: Any, closure: None = None) -> None:
    """``BF16_Optimizer.step``: norm, clipping, update, new weights.

    After a step that the device has skipped the unchanged weights are written once more. The sums
    end with the update: the engine calls ``zero_grad`` right afterwards.
    """
    if closure is not None:
        raise NotImplementedError("BF16_Optimizer does not support a closure")
    norm = _bf16_norm(optimizer)
    # Infinite instead of NaN, as DeepSpeed reports it.
    optimizer._global_grad_norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
    gradients = optimizer.fp32_groups_gradient_flat_partition  # all that this rank updates with

    def clip(norm: Tensor) -> None:
        factor = optimizer.clip_grad / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(gradients, factor.item())

    def step() -> None:
        for master, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()

    step_or_skip(optimizer, norm, optimizer.clip_grad, clip, step)
    if optimizer.overflow:
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


def _bf16_norm(optimizer: Any) -> Tensor:
    """Euclidean norm of all gradients, float32 of shape () on the device.

    Without tensor parallelism the norm of the flat sums, whose padding and unused parts are zero;
    with it every parameter counts once, over the ranks of its group.
    """
    if optimizer.mpu is None:
        return get_total_norm(optimizer.fp32_groups_gradients_flat)
    square = get_total_norm(optimizer.get_grads_for_norm()[0]).square()
    dist.all_reduce(square, group=optimizer.mpu.get_model_parallel_group())
    return square.sqrt()
