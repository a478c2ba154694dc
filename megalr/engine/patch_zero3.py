"""Replacements for methods of ``DeepSpeedZeroOptimizer_Stage3``: gradients, norm, clipping.

DeepSpeed copies each gradient into a bucket and from there into another tensor, converts and adds
its share by kernels of its own, and measures the shares one by one in float64. Here a bucket is one
concatenation and its result is added at once. As for weights (:mod:`megalr.engine.patch_gathers`)
there is no stream for it: a collective goes on beside the computation that is launched after it,
and the memory of gradients belongs to one stream.

Version, gain, test and rule for removal: :mod:`megalr.engine.patches`.
"""

from __future__ import annotations

from collections import deque
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megalr.engine.patch_gathers import Gathers, batch_gathers

_ATTRIBUTES = (
    "averaged_gradients fp16_groups clip_grad loss_scale micro_step_id module "
    "reduce_bucket_size communication_data_type gradient_accumulation_dtype persistent_parameters "
    "reduce_independent_p_g_buckets_and_remove_grads independent_gradient_partition_epilogue "
    "unscale_and_clip_grads fp32_partitioned_groups_flat _get_norm_groups _post_step timers "
    "parameter_offload ipg_buckets reduce_scatter sequence_parallel_size zero_hpz_partition_size "
    "_epilogue_ran_this_backward _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
)
_OFF = (
    "offload_optimizer offload_param swap_optimizer zenflow use_muon model_parallel_group "
    "all2all_process_group autoep_folding_tp_group torch_autocast_gradscaler enable_sanity_checks "
    "zero_quantized_nontrainable_weights params_in_nvme_and_cpu"
)
"""Attributes that are true where something is used that these replacements do not know."""


def batch_zero3(engine: Any, optimizer: Any) -> None:
    """Replace methods of a ``DeepSpeedZeroOptimizer_Stage3`` if it is used in the usual way."""
    if not all(hasattr(optimizer, name) for name in (*_ATTRIBUTES.split(), *_OFF.split())):
        return
    asked = engine._config.zero_config  # how each parameter's methods gather
    if asked.allgather_sequential or asked.use_all_reduce_for_fetch_params:
        return
    gathers = batch_gathers(optimizer) if _as_expected(optimizer) else None
    if gathers is None:
        return
    gradients = _DeepSpeedZeroOptimizer_Stage3(optimizer, gathers)
    optimizer.reduce_independent_p_g_buckets_and_remove_grads = gradients.enter
    optimizer.independent_gradient_partition_epilogue = gradients.finish
    optimizer._post_step = gradients.after_step
    optimizer._get_norm_groups = gradients.norm_groups
    optimizer.unscale_and_clip_grads = MethodType(_clip_where_needed, optimizer)


def _as_expected(optimizer: Any) -> bool:
    """Whether all parameters are divided alike and nothing unknown is done to them."""
    parameters = list(optimizer.module.parameters())
    of_optimizer = [p for group in optimizer.fp16_groups for p in group]
    shares = [p.ds_tensor for p in parameters]
    return (
        not any(getattr(optimizer, name) for name in _OFF.split())
        and optimizer.reduce_scatter
        and len(optimizer.ipg_buckets) == 1
        and optimizer.sequence_parallel_size == 1
        and optimizer.zero_hpz_partition_size == 1
        and {id(p) for p in of_optimizer} <= {id(p) for p in parameters}
        and all(p.requires_grad for p in of_optimizer)
        and all(p.ds_process_group is parameters[0].ds_process_group for p in parameters)
        and all(p.ds_secondary_tensor is None and p.nvme_swapper is None for p in parameters)
        and len({(share.dtype, share.device) for share in shares}) == 1
        and not any(hasattr(share, "ds_quant_scale") for share in shares)
        and not any(hasattr(p, "ds_zero_placement_family") for p in parameters)
    )


class _Bucket(NamedTuple):
    """Gradients on their way: the sums over the ranks of this rank's shares, end to end."""

    work: Any
    sums: Tensor
    sizes: list[int]
    numbers: list[int]
    sent: Tensor
    """What is being reduced, kept until it is."""


class _DeepSpeedZeroOptimizer_Stage3:
    """What DeepSpeed's class of this name does with gradients. ``theirs.__x`` is its private
    attribute only in a class named like it."""

    def __init__(self, theirs: Any, gathers: Gathers) -> None:
        self._theirs, self._gathers = theirs, gathers
        (self._bucket,) = theirs.ipg_buckets.values()
        self._bucket.buffer = None  # what DeepSpeed copies gradients into
        self._rank = dist.get_rank(gathers.group)
        self._under_way: deque[_Bucket] = deque()
        # This rank's share of each parameter, with its padding and without.
        self._shares = [
            [(p, theirs.__param_id_to_grad_partition[p.ds_id]) for p in group]
            for group in theirs.fp16_groups
        ]
        self._real = {
            p.ds_id: share[: max(0, min(share.numel(), p.ds_numel - self._rank * share.numel()))]
            for group in self._shares
            for p, share in group
        }

    def enter(self, param: Any) -> None:
        """``reduce_independent_p_g_buckets_and_remove_grads``: one more gradient for the bucket."""
        bucket = self._bucket
        if bucket.elements and bucket.elements + param.ds_numel > self._theirs.reduce_bucket_size:
            self._reduce()
        if getattr(param, "ds_grad_is_ready", True):  # DeepSpeed's mark of one that goes on growing
            bucket.params.append(param)
            bucket.elements += param.ds_numel

    @torch.no_grad()
    def _reduce(self) -> None:
        """Start to average the bucket's gradients over the ranks, and forget them here.

        The arithmetic is DeepSpeed's ``__avg_scatter_grads``: in the dtype of the communication
        divided by the number of ranks, then summed, in the order of the parameters' numbers.
        """
        theirs, ranks = self._theirs, self._gathers.ranks
        parameters = sorted(self._bucket.params, key=lambda p: p.ds_id)
        self._bucket.clear_params()
        numbers = [p.ds_id for p in parameters]
        if len(set(numbers)) < len(numbers):
            raise RuntimeError(f"a parameter has two gradients in one bucket: {numbers}")
        rows = []
        for parameter in parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient.numel() != parameter.ds_numel:
                raise RuntimeError(
                    f"a gradient has {gradient.numel()} elements, its parameter "
                    f"{parameter.ds_numel}: {parameter.ds_summary()}"
                )
            missing = -gradient.numel() % ranks
            flat = gradient.reshape(-1)
            rows.append((pad(flat, (0, missing)) if missing else flat).view(ranks, -1))
        sizes = [row.shape[1] for row in rows]
        sent = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        del rows, gradient, flat
        sent = sent.to(theirs.communication_data_type)
        sums, work = sent[self._rank], None
        if ranks > 1:
            sent.div_(ranks)
            work = dist.reduce_scatter_tensor(
                sums, sent.view(-1), group=self._gathers.group, async_op=True
            )
        self._under_way.append(_Bucket(work, sums, sizes, numbers, sent))
        if len(self._under_way) > 1:  # the computation waits for the one before
            self._add(self._under_way.popleft())

    def _add(self, bucket: _Bucket) -> None:
        """Write a bucket's result over the last update's sums of micro-batches, or add it."""
        if bucket.work is not None:
            bucket.work.wait()
        first = self._theirs.micro_step_id == 0
        dtype = self._theirs.gradient_accumulation_dtype
        terms = (bucket.sums if first else bucket.sums.to(dtype)).split(bucket.sizes)
        totals = [self._real[number] for number in bucket.numbers]
        pairs = [
            (total, term if term.shape == total.shape else term[: total.numel()])
            for total, term in zip(totals, terms, strict=True)
            if total.numel()
        ]
        if pairs:
            apply = torch._foreach_copy_ if first else torch._foreach_add_
            apply([total for total, _ in pairs], [term for _, term in pairs])

    @torch.no_grad()
    def finish(self) -> None:
        """``independent_gradient_partition_epilogue``: the end of a micro-batch's backward pass.

        The host does not wait; DeepSpeed's does.
        """
        theirs = self._theirs
        if self._bucket.params:
            self._reduce()
        while self._under_way:
            self._add(self._under_way.popleft())
        for number, group in enumerate(self._shares):
            theirs.averaged_gradients[number] = [share for _, share in group]
        theirs._epilogue_ran_this_backward = True

    @torch.no_grad()
    def norm_groups(self) -> list[Tensor]:
        """Norm of all averaged gradients, as that of one group: float32, shape (), on the host.

        Norms of shares in float32, their squares summed in float64, then over the ranks in float32.
        The host waits here and nowhere else in a step. Not finite if a gradient is not, for which
        DeepSpeed skips the update.
        """
        shares = [s for group in self._theirs.averaged_gradients.values() for s in group]
        norms = torch.stack(torch._foreach_norm(shares, 2, dtype=torch.float32))
        square = norms.double().square().sum().float()
        if self._gathers.ranks > 1:
            dist.all_reduce(square, group=self._gathers.group)
        return [square.sqrt().cpu()]

    def after_step(self, timer_names: Any) -> None:
        """``_post_step``: small parameters are whole between updates; gathered by one message."""
        self._gathers.fetch_now(self._theirs.persistent_parameters)
        self._theirs.timers.log(timer_names)


def _clip_where_needed(optimizer: Any, sub_group_id: int, total_norm: Tensor) -> None:
    """``unscale_and_clip_grads``: multiply if the norm is too large; DeepSpeed does so by 1 too.

    The factor is a float32 number, from a norm on the host.
    """
    scale = optimizer.loss_scale
    if optimizer.clip_grad > 0:
        scale = scale * max(1.0, float((total_norm / scale + 1e-6) / optimizer.clip_grad))
    if scale != 1:
        optimizer.fp32_partitioned_groups_flat[sub_group_id].grad.mul_(1 / scale)
