"""Replacements for methods of ``DeepSpeedZeroOptimizer``: ZeRO 1 and 2, ZeRO 2 with offload.

Version, gain, test and rule for removal: :mod:`megalr.engine.patches`.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ATTRIBUTES = (
    "averaged_gradients params_in_partition dp_process_group model_parallel_rank clip_grad "
    "bit16_groups_flat round_robin_bit16_groups round_robin_bit16_offsets loss_scale "
    "scaled_global_norm _model_parallel_all_reduce _update_model_bit16_weights "
    "unscale_and_clip_grads allreduce_and_copy_with_multiple_ranks allreduce_bucket unflatten "
    "overlap_comm reduction_stream"
)
_BUCKET_ATTRIBUTES = (
    "partition_gradients overlap_comm contiguous_gradients reduce_scatter ipg_buckets "
    "use_grad_accum_attribute reduce_gradients reduce_ipg_grads copy_grads_in_partition dtype "
    "overlapping_partition_gradients_reduce_epilogue reduce_bucket_size communication_data_type "
    "_grad_acc_hooks get_param_id bit16_groups"
)
_OFFLOAD_ATTRIBUTES = (
    "averaged_gradients params_in_partition dp_process_group model_parallel_rank clip_grad "
    "bit16_groups_flat loss_scale scaled_global_norm _model_parallel_all_reduce "
    "unscale_and_clip_grads partition_gradients copy_grads_in_partition check_overflow "
    "get_param_id is_gradient_accumulation_boundary grad_position single_partition_of_fp32_groups "
    "real_dp_process_group clear_grad_attribute _offload_accumulated_param_ids "
    "_get_param_group_idx _use_compact_grad_partition_buffer _get_compact_grad_partition_slice "
    "_record_gradient_stream _record_offload_copy"
)


def batch_zero(optimizer: Any) -> None:
    """Replace methods of a ``DeepSpeedZeroOptimizer`` of stage 1 or 2, as its options allow."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    _test_gradients_once(optimizer)
    if not _has(optimizer, _ATTRIBUTES) or isinstance(optimizer.optimizer, MuonWithAuxAdam):
        return
    optimizer.scaled_global_norm = MethodType(_zero_norm, optimizer)
    _clip_where_needed(optimizer)
    _keep_weights_in_place(optimizer)
    optimizer.allreduce_and_copy_with_multiple_ranks = MethodType(_sum_over_ranks, optimizer)
    as_expected = (
        _has(optimizer, _BUCKET_ATTRIBUTES)
        and optimizer.contiguous_gradients
        and optimizer.reduce_scatter
        and not optimizer.partition_gradients
        and not optimizer.overlap_comm
        and not optimizer.use_grad_accum_attribute
        and not getattr(optimizer, "zenflow", False)
        and len(optimizer.ipg_buckets) == 1
        and getattr(optimizer, "autoep_folding_tp_group", None) is None
    )
    if as_expected:
        _reduce_in_buckets(optimizer)


def batch_offload(optimizer: Any) -> None:
    """Let the host wait once in an update of ZeRO 2 whose optimizer is in its memory.

    The sums of the micro-batches are float32 on the device. In the last one DeepSpeed copies those
    of each parameter to the host while the backward pass goes on, but also tests and measures them
    (in float64), and reads both results at once: the host falls behind the device, twice for each
    parameter. Then it multiplies all of them in the host's memory, by 1 if nothing is clipped.
    Here they are only copied; norm and test are those of :func:`batch_zero`, on the device.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    as_expected = (
        _has(optimizer, _OFFLOAD_ATTRIBUTES)
        and optimizer.partition_gradients
        and not getattr(optimizer, "zenflow", False)
        and not isinstance(optimizer.optimizer, MuonWithAuxAdam)
        and all(
            optimizer._use_compact_grad_partition_buffer(group)
            for group in range(len(optimizer.bit16_groups_flat))
        )
    )
    if not as_expected:
        return
    _test_gradients_once(optimizer)
    optimizer.scaled_global_norm = MethodType(_zero_norm, optimizer)
    _clip_where_needed(optimizer)
    optimizer.copy_grads_in_partition = MethodType(_copy_to_host, optimizer)


def _copy_to_host(optimizer: Any, parameter: Any, group_idx: int | None = None) -> None:
    """``copy_grads_in_partition`` with offload: this rank's float32 sums of a parameter, last."""
    from deepspeed.accelerator import get_accelerator

    group = optimizer._get_param_group_idx(parameter) if group_idx is None else group_idx
    identity = optimizer.get_param_id(parameter)
    optimizer._offload_accumulated_param_ids.add(identity)
    if not optimizer.is_gradient_accumulation_boundary():
        return
    _, _, start, numel = optimizer.grad_position[identity]
    rank = dist.get_rank(optimizer.real_dp_process_group[group])
    total = optimizer._get_compact_grad_partition_slice(group, rank, identity, numel)
    gradient = optimizer.single_partition_of_fp32_groups[group].grad
    gradient.narrow(0, start, numel).copy_(total, non_blocking=True)
    optimizer._record_gradient_stream(total, get_accelerator().current_stream())
    optimizer._record_offload_copy()
    optimizer.clear_grad_attribute(parameter)


def _has(optimizer: Any, names: str) -> bool:
    """Whether this version of DeepSpeed has what a replacement relies on."""
    return all(hasattr(optimizer, name) for name in names.split())


def _test_gradients_once(optimizer: Any) -> None:
    """Let the gradient norm alone find inf and nan under ZeRO 1 and 2.

    ``DeepSpeedZeroOptimizer.step`` looks at every gradient by itself, some six kernels a parameter,
    and then at the norm, which is not finite whenever one of them is not; both skip the update on
    all ranks.
    """
    optimizer.check_overflow = lambda partition_gradients=True: None


@torch.no_grad()
def _zero_norm(optimizer: Any, norm_type: int = 2) -> Tensor:
    """Norm of all averaged gradients, float32 of shape () on the host; -1 if it is not finite.

    Norms of tensors in float32, their squares summed in float64 (DeepSpeed: both in float64, a
    conversion of every gradient), then over the ranks in float32. The host waits here and nowhere
    else in a step.
    """
    if norm_type != 2:
        raise ValueError(f"norm_type is {norm_type}: ZeRO has the Euclidean norm (2) only")
    counted = []
    for group, parameters in enumerate(optimizer.params_in_partition):
        counted += _gradients_that_count(optimizer, optimizer.averaged_gradients[group], parameters)
    square = torch.zeros((), dtype=torch.float32, device=optimizer.bit16_groups_flat[0].device)
    if counted:
        norms = torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32))
        square = norms.double().square().sum().float()
    if dist.get_world_size(optimizer.dp_process_group) > 1:
        dist.all_reduce(square, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    norm = square.sqrt().cpu()
    return norm if math.isfinite(norm) else torch.full_like(norm, -1.0)


def _gradients_that_count(
    optimizer: Any, gradients: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """This rank's gradients of one group without padding, whole parameters on one rank only."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    held = (g for g in gradients if not getattr(g, "_zero_padding", False))
    # DeepSpeed may pad at the end without a mark; there are no parameters for that.
    return [
        gradient
        for gradient, parameter in zip(held, parameters, strict=False)
        if optimizer.model_parallel_rank == 0 or is_model_parallel_parameter(parameter)
    ]


def _clip_where_needed(optimizer: Any) -> None:
    """Multiply gradients if their norm is too large only; DeepSpeed multiplies by 1 otherwise.

    The norm being on the host, so is the factor: in float32, while DeepSpeed's lies on the device
    and is rounded to bf16 there where gradients are bf16.
    """
    one_by_one = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(self: Any, gradients: list[Any], norm: Any) -> None:
        if self.loss_scale != 1.0 or self.clip_grad <= 0 or not norm >= 0:
            one_by_one(gradients, norm)
            return
        excess = (norm + 1e-6) / self.clip_grad
        if excess > 1:
            factor = (1.0 / excess).item()
            for gradient in gradients:  # one; _foreach_mul_ rounds the factor to bf16 on the CPU
                gradient.mul_(factor)

    optimizer.unscale_and_clip_grads = MethodType(unscale_and_clip_grads, optimizer)


def _keep_weights_in_place(optimizer: Any) -> None:
    """Make parameters views of the flat weights again only if one of them no longer is."""
    relink = optimizer._update_model_bit16_weights

    def _update_model_bit16_weights(self: Any, group: int) -> None:
        start = self.bit16_groups_flat[group].data_ptr()
        size = self.bit16_groups_flat[group].element_size()
        places = zip(
            self.round_robin_bit16_groups[group], self.round_robin_bit16_offsets[group], strict=True
        )
        if any(p.data_ptr() != start + offset * size for p, offset in places):
            relink(group)

    optimizer._update_model_bit16_weights = MethodType(_update_model_bit16_weights, optimizer)


def _sum_over_ranks(
    optimizer: Any,
    small_bucket: list[Tensor],
    communication_data_type: torch.dtype,
    log: Any = None,
    divide: bool = True,
    process_group: Any = None,
    bucket_ranks: Any = None,
    output_bucket: Any = None,
) -> None:
    """``allreduce_and_copy_with_multiple_ranks``: sum gradients, keep those of this rank.

    ``bucket_ranks[i]`` (a number or a set of them) wants the sum of ``small_bucket[i]``, written
    back there and added to ``output_bucket[i]``, the float32 sum over micro-batches, if there is
    one. DeepSpeed converts, adds and writes every tensor by itself.
    """
    group = optimizer.dp_process_group if process_group is None else process_group
    reduced = optimizer.allreduce_bucket(
        small_bucket, communication_data_type, log=log, divide=divide, process_group=group
    )
    parts = optimizer.unflatten(reduced, small_bucket)
    outputs = output_bucket or [None] * len(small_bucket)
    wanted = [ranks if isinstance(ranks, frozenset) else {ranks} for ranks in bucket_ranks]
    rank = dist.get_rank(group)
    entries = zip(parts, small_bucket, outputs, wanted, strict=True)
    kept = [entry[:3] for entry in entries if rank in entry[3]]
    if not kept:
        return
    torch._foreach_copy_([tensor for _, tensor, _ in kept], [part for part, _, _ in kept])
    totals = [output for _, _, output in kept if output is not None]
    if totals:
        terms = [torch.empty_like(total) for total in totals]
        torch._foreach_copy_(terms, [part for part, _, output in kept if output is not None])
        torch._foreach_add_(totals, terms)
    if optimizer.overlap_comm and reduced.is_cuda:  # memory that another stream has allocated
        for tensor in (reduced, *(tensor for _, tensor, _ in kept)):
            tensor.record_stream(optimizer.reduction_stream)


def _reduce_in_buckets(optimizer: Any) -> None:
    """Average ``.grad`` over the ranks of ZeRO-1 bucket by bucket, at the end of an update.

    DeepSpeed copies every gradient into a bucket and from there into another tensor, and runs a
    hook for each, which has nothing to do at this stage. Here a bucket is made at once and stays
    where it is until the step; one rank alone keeps its gradients.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    (communicated,) = optimizer.ipg_buckets
    alone = dist.get_world_size(optimizer.dp_process_group) == 1
    reduce_bucket = optimizer.reduce_ipg_grads

    def reduce_gradients(self: Any, pipeline_parallel: bool = False) -> None:
        if not (alone and communicated == self.dtype):
            for parameters in _buckets(self):
                _fill(self.ipg_buckets[communicated], parameters, self.get_param_id)
                reduce_bucket(communicated)
                self.ipg_buckets[communicated].buffer.clear()
        self.overlapping_partition_gradients_reduce_epilogue()

    # Called when all buckets are done, and for every parameter of a bucket.
    optimizer.reduce_ipg_grads = lambda comm_dtype=None: None
    optimizer.copy_grads_in_partition = lambda parameter, group_idx=None: None
    optimizer.reduce_gradients = MethodType(reduce_gradients, optimizer)


def _buckets(optimizer: Any) -> list[list[tuple[int, Any]]]:
    """Parameters with a gradient, and the numbers of their groups, in DeepSpeed's buckets."""
    buckets: list[list[tuple[int, Any]]] = [[]]
    elements = 0
    for number, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            if parameter.grad is None:
                continue
            if elements + parameter.numel() > optimizer.reduce_bucket_size and buckets[-1]:
                buckets.append([])
                elements = 0
            buckets[-1].append((number, parameter))
            elements += parameter.numel()
    return buckets if buckets[-1] else []


def _fill(bucket: Any, parameters: list[tuple[int, Any]], identity: Any) -> None:
    """Gather gradients in one flat tensor, make ``.grad`` views of it, and enter them.

    A gradient that is a bucket of its own stays where it is.
    """
    gradients = [parameter.grad for _, parameter in parameters]
    flats = [gradient.reshape(-1) for gradient in gradients]
    flat = torch.cat(flats) if len(flats) > 1 else flats[0]
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.data = part.view_as(gradient)
    bucket.buffer.append(flat)
    bucket.index = 0
    bucket.elements = flat.numel()
    bucket.grads.extend(gradients)
    bucket.params.extend((number, p.param_idx_in_group, identity(p)) for number, p in parameters)
