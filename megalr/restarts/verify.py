"""A check that all ranks hold the same weights, and that these are the rounded masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.engine.state import EngineState
from megalr.sharding.tensor_shard import shard_of

_CHUNK = 1 << 22  # elements hashed at a time: 32 MiB of int64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_checksum(tensor: Tensor) -> Tensor:
    """A 64-bit number that depends on every bit of a tensor and its position; int64 scalar.

    The sum over the elements i of (bits_i + 1) (2 i + 1), modulo 2^64.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64) + 1
        place = torch.arange(start, start + part.numel(), device=tensor.device) * 2 + 1
        total += (part * place).sum()
    return total


@torch.no_grad()
def verify_weights(state: EngineState, parameters: Sequence[nn.Parameter]) -> None:
    """Raise RuntimeError, on all ranks, where weights differ between ranks or from their masters.

    Collective over the data-parallel group and, for weights that are not split, over the
    tensor-parallel one; under ZeRO-3 every parameter is gathered once.
    """
    sums, stale = [], []
    for parameter in parameters:
        with state.wrapper.whole(parameter):
            sums.append(bit_checksum(parameter).to(state.device))
            master = state.master(parameter)
            differs = torch.zeros((), dtype=torch.int64, device=state.device)
            if master is not None:
                start, stop = state.held(parameter)
                weights = parameter.detach().view(-1)[start:stop]
                rounded = master.to(weights.device, weights.dtype)
                differs = (weights != rounded).sum().to(state.device)
            stale.append(differs)
    if not sums:
        return
    lowest = torch.stack(sums)
    highest = lowest.clone()
    count = torch.stack(stale)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=state.process_group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=state.process_group)
    dist.all_reduce(count, group=state.process_group)
    differ = lowest != highest
    if state.tensor_group is not None:
        whole = torch.tensor([shard_of(p) is None for p in parameters], device=state.device)
        lowest, highest = lowest * whole, highest * whole
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=state.tensor_group)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=state.tensor_group)
        found = torch.stack((differ | (lowest != highest), count > 0)).to(torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=state.tensor_group)
        differ, count = found[0].bool(), found[1]
    _raise_if_any(state, parameters, differ.tolist(), "differ between ranks")
    _raise_if_any(state, parameters, (count > 0).tolist(), "are not the rounded masters")


def _raise_if_any(
    state: EngineState, parameters: Sequence[nn.Parameter], bad: list[bool], what: str
) -> None:
    names = [state.name(p) for p, flag in zip(parameters, bad, strict=True) if flag]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeError(f"after the restart the weights of {', '.join(names[:3])}{more} {what}")
