"""Replacements for methods of ZeRO 3's ``PartitionedParameterCoordinator``: when weights are whole.

DeepSpeed decides what is gathered and freed, and when, by one pass through Python for each
parameter, with ranges for a profiler, texts for a log and an event of the device in each. Here the
decisions are the same; a module's parameters are listed once, a message is copied out by one
operator, and nothing else is done for a parameter but setting it.

There is no stream for gathers either. A message is started from the stream of the computation,
where the collective waits for what was launched before it and goes on beside what comes after, and
its weights are copied out on that stream when they are needed. So all this memory belongs to one
stream: the allocator gives it out again in the order of launches, no event has to tell it when, and
however far the host runs ahead, no more weights are whole at a time than the computation has.

Version, gain, test and rule for removal: :mod:`megalr.engine.patches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PRIVATE = (
    "step_id leaf_module_lock active_backward_submodules inflight_param_registry "
    "most_recent_step_id_param_fetched_for param_queue max_n_available_params prefetch_bucket_sz "
    "params_to_release n_available_params"
)


def batch_gathers(optimizer: Any) -> Gathers | None:
    """Replace methods of the parameter coordinator of a ``DeepSpeedZeroOptimizer_Stage3``.

    Every parameter must be divided over the same ranks, and is of one dtype and on one device.
    None, and nothing replaced, if the coordinator is not as expected.
    """
    offload = optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    prefix = "_PartitionedParameterCoordinator__"
    as_expected = (
        all(hasattr(coordinator, prefix + name) for name in _PRIVATE.split())
        and not coordinator.fast_sharding_for_leaf_module
        and not coordinator.zero_quantized_weights
        and not coordinator.zero_quantized_nontrainable_weights
    )
    if not as_expected:
        return None
    gathers = _PartitionedParameterCoordinator(coordinator, offload.module)
    coordinator.fetch_sub_module = gathers.fetch
    coordinator.release_sub_module = gathers.release
    offload.partition_all_parameters = gathers.release_all
    _call_in_backward(offload)
    return gathers


def _call_in_backward(offload: Any) -> None:
    """Replace the autograd functions by which a module's hooks know that its backward pass begins
    or ends.

    torch inspects the signature of functions like DeepSpeed's (with ``setup_context``) in every
    call, which takes three quarters of it.
    """
    for module in offload.module.modules():
        if {"pre_bwd_fn", "post_bwd_fn"} <= vars(module).keys():
            module.pre_bwd_fn = _Begins(module, offload)
            module.post_bwd_fn = _Ends(module, offload)


class _Calling(torch.autograd.Function):
    """The identity, in whose backward pass something is called first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.call()
        return grads[0], None


class _Begins:
    """``PreBackwardFunctionForModule``, applied to the outputs: gather the module's weights."""

    def __init__(self, module: Any, offload: Any) -> None:
        self._module, self._offload, self._outputs = module, offload, 0

    def apply(self, output: Tensor) -> Any:
        """The output."""
        self._outputs += 1
        return _Calling.apply(output, self._call)

    def _call(self) -> None:
        if self._outputs > 0:
            self._offload.pre_sub_module_backward_function(self._module)
            self._outputs -= 1


class _Ends:
    """``PostBackwardFunctionModule``, applied to the inputs: release the module's weights."""

    def __init__(self, module: Any, offload: Any) -> None:
        self._module, self._offload = module, offload

    def apply(self, x: Tensor) -> Any:
        """The input."""
        self._module.ds_grads_remaining += x.requires_grad
        return _Calling.apply(x, self._call)

    def _call(self) -> None:
        self._module.ds_grads_remaining -= 1
        if self._module.ds_grads_remaining == 0:
            self._offload.post_sub_module_backward_function(self._module)


class Gathers:
    """Whole weights of parameters that are divided over ranks.

    Args:
        parameters: all of them, of one dtype, on one device and divided over the same ranks.
    """

    def __init__(self, parameters: list[Any]) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.away = ZeroParamStatus.NOT_AVAILABLE
        self.coming = ZeroParamStatus.INFLIGHT
        self.there = ZeroParamStatus.AVAILABLE
        self.group = parameters[0].ds_process_group
        self.ranks = dist.get_world_size(self.group)
        self.parameters = parameters
        self._nothing = torch.empty_like(parameters[0].ds_tensor[:0])

    def start(self, parameters: Iterable[Any]) -> _Message | None:
        """Send for weights that are not here; None if they are here at once, on one rank."""
        ordered = sorted(parameters, key=_number)
        if self.ranks > 1:
            return _Message(ordered, self)
        for parameter in ordered:
            parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
            parameter.ds_status = self.there
        return None

    def fetch_now(self, parameters: list[Any]) -> None:
        """Make parameters whole, by one message."""
        missing = [p for p in parameters if p.ds_status is self.away]
        message = self.start(missing) if missing else None
        if message is not None:
            message.wait()

    def drop(self, parameter: Any) -> None:
        """Forget a parameter's whole weights; its share stays."""
        parameter.data = self._nothing
        parameter.ds_status = self.away


class _Message:
    """Weights on their way to all ranks, each of which sends its shares of them end to end."""

    def __init__(self, parameters: list[Any], gathers: Gathers) -> None:
        self._parameters, self._gathers = parameters, gathers
        shares = [parameter.ds_tensor for parameter in parameters]
        self._sizes = [share.numel() for share in shares]
        self._rows = shares[0].new_empty(gathers.ranks, sum(self._sizes))
        mine = self._rows[dist.get_rank(gathers.group)]
        torch.cat(shares, out=mine)
        self._work = dist.all_gather_into_tensor(
            self._rows.view(-1), mine, group=gathers.group, async_op=True
        )
        for parameter in parameters:
            parameter.ds_status = gathers.coming

    def wait(self, handle_dependency: bool = True) -> None:
        """Make the parameters whole. DeepSpeed calls it too, for messages that are left over."""
        if self._work is None:
            return
        self._work.wait()
        if len(self._sizes) == 1:
            wholes = [self._rows]
        else:
            wholes = [self._rows.new_empty(self._gathers.ranks, size) for size in self._sizes]
            torch.split_with_sizes_copy(self._rows, self._sizes, dim=1, out=wholes)
        for parameter, whole in zip(self._parameters, wholes, strict=True):
            numel = parameter.ds_numel  # without the padding of the last share
            exact = whole if whole.numel() == numel else whole.view(-1)[:numel]
            parameter.data = exact.view(parameter.ds_shape)
            parameter.ds_status = self._gathers.there
        self._work = self._rows = None


def _number(parameter: Any) -> int:
    return int(parameter.ds_id)


class _PartitionedParameterCoordinator(Gathers):
    """What DeepSpeed's class of this name does. ``theirs.__x`` is its private attribute only in a
    class named like it."""

    def __init__(self, theirs: Any, model: nn.Module) -> None:
        super().__init__(list(model.parameters()))
        self._theirs = theirs
        self._of: dict[nn.Module, list[Any]] = {}
        # As DeepSpeed, which keeps these sets too; behind them are its limits and recorded order.
        self._released: dict[tuple[nn.Module, int], set[int]] = {}

    def _parameters_of(self, module: Any) -> list[Any]:
        """What a module with hooks needs: a block's, or a layer's own and external parameters."""
        found = self._of.get(module)
        if found is None:
            from deepspeed.utils import z3_leaf_module

            found = self._of[module] = list(module.parameters(recurse=z3_leaf_module(module)))
        if module._external_params:  # used without being part of it; DeepSpeed finds them by use
            return list(dict.fromkeys([*found, *module._external_params.values()]))
        return found

    def fetch(self, current_submodule: Any, forward: bool) -> None:
        """``fetch_sub_module``: make a module's parameters whole, and send for the next ones."""
        theirs = self._theirs
        with theirs.__leaf_module_lock:  # autograd may ask from several threads
            if not forward:
                theirs.__active_backward_submodules[current_submodule.ds_id] = current_submodule
            needed = self._parameters_of(current_submodule)
            self._send_for([p for p in needed if p.ds_status is self.away])
            self._wait_for(needed, current_submodule, forward)
            if theirs.is_complete_trace():
                self._take_from_queue(needed)
                self._prefetch()
            theirs.__step_id += 1

    def _send_for(self, parameters: list[Any]) -> None:
        if not parameters:
            return
        message = self.start(parameters)
        self._theirs.__n_available_params += sum(p.ds_numel for p in parameters)
        if message is not None:
            self._theirs.__inflight_param_registry.data.update(dict.fromkeys(parameters, message))

    def _wait_for(self, needed: list[Any], module: Any, forward: bool) -> None:
        coming = self._theirs.__inflight_param_registry.data
        # Frozen parameters of a module that is computed again are freed with the module for whose
        # backward pass it is: theirs need not come.
        active = self._theirs.__active_backward_submodules
        again = forward and active and torch._C._current_graph_task_id() != -1
        owner = next(reversed(active.values())) if again else None
        for parameter in needed:
            parameter.ds_active_sub_modules.add(module.ds_id)
            if owner is not None and not parameter.requires_grad:
                owner.ds_recompute_parameters.add(parameter)
                parameter.ds_active_sub_modules.add(owner.ds_id)
            if coming and parameter in coming:
                coming.pop(parameter).wait()
            if parameter.ds_status is not self.there:
                raise RuntimeError(f"a parameter is not whole: {parameter.ds_summary()}")

    def _take_from_queue(self, needed: list[Any]) -> None:
        """Pass over the recorded uses of parameters that are here now."""
        theirs = self._theirs
        queue, used = theirs.__param_queue, theirs.__most_recent_step_id_param_fetched_for
        due = {p for p in needed if used[p] < theirs.__step_id}
        taken: set[Any] = set()
        while queue and len(taken) < len(due):
            use = queue.popleft()
            used[use.param] = use.step_id_last_used_at
            taken.add(use.param)
        if taken != due:
            raise RuntimeError(
                f"at step {theirs.__step_id} of the recorded order of modules parameters "
                f"{sorted(map(_number, taken))} are due, not {sorted(map(_number, due))}"
            )

    def _prefetch(self) -> None:
        """Send for the parameters that are used next, as many as DeepSpeed's limits allow."""
        theirs = self._theirs
        queue, used = theirs.__param_queue, theirs.__most_recent_step_id_param_fetched_for
        room = theirs.__max_n_available_params - theirs.__n_available_params
        limit = min(room, theirs.__prefetch_bucket_sz)
        chosen: dict[Any, None] = {}
        elements = 0
        while queue and elements < limit:
            use = queue.popleft()
            parameter = use.param
            used[parameter] = max(used[parameter], use.step_id_last_used_at)
            if parameter.ds_status is self.away and parameter not in chosen:
                chosen[parameter] = None
                elements += parameter.ds_numel
        self._send_for(list(chosen))

    def release(self, submodule: Any, forward: bool = False) -> None:
        """``release_sub_module``: free a module's parameters, except those that are used soon."""
        theirs, parameters = self._theirs, self._parameters_of(submodule)
        if theirs.is_complete_trace():
            key = submodule, theirs.__step_id
            released = self._released.get(key)
            if released is None:
                released = self._released[key] = theirs.__params_to_release(*key)
        else:
            released = {parameter.ds_id for parameter in parameters}
        if not forward:
            again = submodule.ds_recompute_parameters
            if again:
                released = released.union(p.ds_id for p in again if not p.ds_persist)
                parameters = list(dict.fromkeys([*parameters, *again]))
                again.clear()
            theirs.__active_backward_submodules.pop(submodule.ds_id, None)
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(submodule.ds_id)
            if parameter.ds_id in released and not parameter.is_external_param:
                self._free(parameter)

    def _free(self, parameter: Any) -> None:
        if parameter.ds_status is self.there and not parameter.ds_active_sub_modules:
            self.drop(parameter)
            self._theirs.__n_available_params -= parameter.ds_numel

    def release_all(self) -> None:
        """``partition_all_parameters``: free everything, before the weights change."""
        coming = self._theirs.__inflight_param_registry.data
        for parameter in self.parameters:
            if parameter in coming:
                coming.pop(parameter).wait()
            parameter.ds_active_sub_modules.clear()
            self._free(parameter)
            if parameter.ds_status is not self.away:
                raise RuntimeError(f"a parameter is still whole: {parameter.ds_summary()}")
