"""Collective decisions: run a function on rank 0 or on all ranks, share its result or error."""

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
    """Run ``function`` on rank 0; return its result, or raise its UserError, on every rank.

    Collective. Files are read by one rank only, and no rank continues after another has failed.
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
    """Raise an AgreedError on every rank if any rank passes an error. Collective.

    The error is that of the lowest failing rank, prefixed by its rank (and its host, if there are
    several) in a world of more than one.
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
    """Return ``function()`` on every rank, or raise an AgreedError on every rank if one fails.

    Collective. UserErrors and errors of the given ``kinds`` are caught; others propagate.
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
    """The largest value over all ranks. Collective."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)
