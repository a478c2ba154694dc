"""Decisions that every rank takes alike: run on one rank or all, share the result or the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megalr.distributed.launcher_env import host_name
from megalr.errors import AgreedError, UserError

T = TypeVar("T")


def is_rank0() -> bool:
    """Whether this is rank 0 of the world."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_on_rank0(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and give its result, or its UserError, to every rank.

    Every rank must call it. Files are looked at by one rank, and no rank goes on while another
    one has stopped.
    """
    answer: list[tuple[bool, object]] = [(True, None)]
    if is_rank0():
        try:
            answer = [(True, function())]
        except UserError as error:
            answer = [(False, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    succeeded, value = answer[0]
    if not succeeded:
        raise AgreedError(str(value))
    return value  # type: ignore[return-value]


def raise_on_any_rank(error: Exception | None) -> None:
    """Raise an AgreedError on every rank if any rank has an error; every rank must call it.

    The error is the lowest such rank's, with its number and its host where there are several.
    """
    own = host_name(), str(error) if error is not None else None
    found = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
    hosts = {host for host, _ in found}
    for rank, (host, text) in enumerate(found):
        if text is not None:
            where = f"rank {rank}{f' on {host}' if len(hosts) > 1 else ''}: "
            raise AgreedError(f"{where if len(found) > 1 else ''}{text}")


def run_on_all(function: Callable[[], T], *kinds: type[Exception]) -> T:
    """``function()`` on every rank, or an AgreedError on every rank if one raises.

    Caught are UserErrors and the ``kinds`` of errors named besides.
    """
    expected: tuple[type[Exception], ...] = (UserError, *kinds)
    error: Exception | None = None
    results: list[T] = []
    try:
        results.append(function())
    except expected as caught:
        error = caught
    raise_on_any_rank(error)
    return results[0]


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest value over all ranks, so that they decide alike."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)
