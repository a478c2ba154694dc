"""One kernel where DeepSpeed's ZeRO-1 and ZeRO-2 wrappers launch one for every parameter.

``BF16_Optimizer`` and ``DeepSpeedZeroOptimizer`` add up, copy and measure gradients tensor by
tensor: some hundred launches and as many passes through Python in every update, in which a GPU
waits. The methods here do the same for all tensors of a group at once. They take the place of
DeepSpeed's on one optimizer object, after a check that it is of the kind whose code they follow
(DeepSpeed 0.19.8); any other keeps DeepSpeed's own. Weights stay bitwise what they were on the
CPU; gradient norms differ by rounding (docs/deepspeed-notes.md).
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm


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
        _batch_bf16(engine, optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        _test_gradients_once(optimizer)
        _batch_zero(optimizer)


def _has(optimizer: Any, names: str) -> bool:
    """Whether this version of DeepSpeed has what a replacement relies on."""
    return all(hasattr(optimizer, name) for name in names.split())


# ------------------------------------------------------------------------------ BF16_Optimizer

_BF16 = (
    "bf16_groups fp32_groups_gradients fp32_groups_gradients_flat fp32_groups_has_gradients "
    "fp32_groups_gradient_flat_partition fp32_groups_flat_partition update_hp_grads clear_hp_grads "
    "clear_lp_grads get_grads_for_norm get_grads_for_reduction update_lp_params clip_grad "
    "_lazy_init_hp_params_optimizer_state _uses_muon immediate_grad_update norm_type mpu"
)


def _batch_bf16(engine: Any, optimizer: Any) -> None:
    usual = (
        _has(optimizer, _BF16)
        and not optimizer._uses_muon
        and not optimizer.immediate_grad_update
        and optimizer.norm_type == 2
        and optimizer.grad_acc_dtype == torch.float32
        and getattr(optimizer, "autoep_folding_tp_group", None) is None
    )
    if not usual:
        return
    # Sums in the shapes of the gradients: a batched copy wants equal shapes.
    sums = [
        [total.view(p.shape) for total, p in zip(totals, group, strict=True)]
        for totals, group in zip(
            optimizer.fp32_groups_gradients, optimizer.bf16_groups, strict=True
        )
    ]
    one_by_one = optimizer.update_hp_grads

    def update_hp_grads(self: Any, clear_lp_grads: bool = False) -> None:
        if clear_lp_grads:
            one_by_one(clear_lp_grads)
            return
        for number, group in enumerate(self.bf16_groups):
            _add_gradients(self, number, group, sums[number])

    optimizer.update_hp_grads = MethodType(update_hp_grads, optimizer)
    optimizer.step = MethodType(_bf16_step, optimizer)
    if dist.get_world_size(engine.seq_data_parallel_group) == 1:
        low = engine.communication_data_type
        rounds = low != torch.float32 and engine.gradient_accumulation_steps() > 1
        _reduce_on_one_rank(optimizer, low if rounds else None)


@torch.no_grad()
def _add_gradients(optimizer: Any, number: int, group: list[Any], sums: list[Tensor]) -> None:
    """``sums += .grad`` for a group's parameters, bf16 onto float32.

    The first micro-batch of an update, which finds zeros, is written over them (one kernel for
    some hundred tensors, and no reading of the sums); later ones are gathered into one bf16 tensor
    and added to the flat sums in one more.
    """
    has_gradient = optimizer.fp32_groups_has_gradients[number]
    used = [index for index, parameter in enumerate(group) if parameter.grad is not None]
    if not any(has_gradient):
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
    (28 bytes a parameter) to add up nothing. What is left of that is the rounding to that type,
    where the sums are not of that type already: of several micro-batches.
    """

    def get_grads_for_reduction(self: Any) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        if rounds_to is not None:
            for flat in self.fp32_groups_gradients_flat:
                flat.copy_(flat.to(rounds_to))
        return [], {}

    optimizer.get_grads_for_reduction = MethodType(get_grads_for_reduction, optimizer)


@torch.no_grad()
def _bf16_step(optimizer: Any, closure: None = None) -> None:
    """``BF16_Optimizer.step``: norm, clipping, update, new weights; the host waits once.

    The sums are not cleared here: the engine calls ``zero_grad``, which does so, right afterwards.
    """
    if closure is not None:
        raise NotImplementedError("BF16_Optimizer does not support a closure")
    norm = _bf16_norm(optimizer)
    optimizer.overflow = not math.isfinite(norm)
    if optimizer.overflow:
        optimizer._global_grad_norm = float("inf")
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return
    optimizer._global_grad_norm = norm
    own = optimizer.fp32_groups_gradient_flat_partition
    if optimizer.clip_grad > 0:
        factor = optimizer.clip_grad / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(own, factor.item())  # the rank updates with nothing else
    for master, gradient in zip(optimizer.fp32_groups_flat_partition, own, strict=True):
        master.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


def _bf16_norm(optimizer: Any) -> Tensor:
    """Euclidean norm of all gradients, float32 of shape () on the host; the host waits for it.

    Without tensor parallelism that of the flat sums, whose padding and unused parts are zero; with
    it every parameter once, over the ranks of its group.
    """
    if optimizer.mpu is None:
        return get_total_norm(optimizer.fp32_groups_gradients_flat).cpu()
    square = get_total_norm(optimizer.get_grads_for_norm()[0]).square()
    dist.all_reduce(square, group=optimizer.mpu.get_model_parallel_group())
    return square.sqrt().cpu()


# ---------------------------------------------------------------------- DeepSpeedZeroOptimizer

_ZERO = (
    "averaged_gradients params_in_partition dp_process_group model_parallel_rank clip_grad "
    "bit16_groups_flat round_robin_bit16_groups round_robin_bit16_offsets loss_scale "
    "scaled_global_norm _model_parallel_all_reduce _update_model_bit16_weights "
    "unscale_and_clip_grads allreduce_and_copy_with_multiple_ranks allreduce_bucket unflatten "
    "overlap_comm reduction_stream"
)
_REDUCE = (
    "partition_gradients overlap_comm contiguous_gradients reduce_scatter ipg_buckets "
    "use_grad_accum_attribute reduce_gradients reduce_ipg_grads copy_grads_in_partition dtype "
    "overlapping_partition_gradients_reduce_epilogue reduce_bucket_size communication_data_type "
    "_grad_acc_hooks get_param_id bit16_groups"
)


def _test_gradients_once(optimizer: Any) -> None:
    """Let the gradient norm alone find inf and nan under ZeRO 1 and 2.

    ``DeepSpeedZeroOptimizer.step`` looks at every gradient by itself, some six kernels a parameter,
    and then at the norm, which is not finite whenever one of them is not; both skip the update on
    all ranks. With offload the first test is another one and stays (docs/deepspeed-notes.md).
    """
    optimizer.check_overflow = lambda partition_gradients=True: None


def _batch_zero(optimizer: Any) -> None:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not _has(optimizer, _ZERO) or isinstance(optimizer.optimizer, MuonWithAuxAdam):
        return
    optimizer.scaled_global_norm = MethodType(_zero_norm, optimizer)
    _clip_where_needed(optimizer)
    _keep_weights_in_place(optimizer)
    optimizer.allreduce_and_copy_with_multiple_ranks = MethodType(_sum_over_ranks, optimizer)
    usual = (
        _has(optimizer, _REDUCE)
        and optimizer.contiguous_gradients
        and optimizer.reduce_scatter
        and not optimizer.partition_gradients
        and not optimizer.overlap_comm
        and not optimizer.use_grad_accum_attribute
        and not getattr(optimizer, "zenflow", False)
        and len(optimizer.ipg_buckets) == 1
        and getattr(optimizer, "autoep_folding_tp_group", None) is None
    )
    if usual:
        _reduce_in_buckets(optimizer)


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
    """Make parameters views of the flat weights again only if one of them is none any more."""
    anew = optimizer._update_model_bit16_weights

    def _update_model_bit16_weights(self: Any, group: int) -> None:
        start = self.bit16_groups_flat[group].data_ptr()
        size = self.bit16_groups_flat[group].element_size()
        places = zip(
            self.round_robin_bit16_groups[group], self.round_robin_bit16_offsets[group], strict=True
        )
        if any(p.data_ptr() != start + offset * size for p, offset in places):
            anew(group)

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
