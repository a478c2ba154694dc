"""Report a collective that fails because a peer is gone: one line naming rank and collective."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megalr.distributed.launcher_env import host_name
from megalr.errors import PeerLost

_PEER_LOSS = re.compile(
    r"Timed out waiting|Connection closed by peer|Connection reset by peer|Broken pipe|"
    r"No route to host|Network is unreachable|Connection timed out|Read error|wait timeout",
    re.IGNORECASE,
)
_INTERNAL_FRAMES = {"wrapper", "wait"}


@contextmanager
def name_lost_peers(timeout_seconds: float) -> Iterator[None]:
    """Convert gloo's error for a collective whose peers are gone into a PeerLost.

    NCCL's watchdog ends the process itself and logs rank and collective. Other errors propagate
    unchanged.

    Args:
        timeout_seconds: time limit of a collective, for the message.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # gloo may append a hint; the reason is in the first line
        reason = str(error).splitlines()[0] if str(error) else ""
        if not _PEER_LOSS.search(reason):
            raise
        raise PeerLost(
            f"rank {os.environ.get('RANK', '0')} on {host_name()}: {collective_of(error)} got no "
            f"answer from another rank (limit run.timeout_seconds {timeout_seconds:g}): {reason}; "
            "look for the first rank that ended and at the network, then start the same command "
            "again to go on from the newest checkpoint"
        ) from error


def collective_of(error: BaseException) -> str:
    """Name of the collective that raised an error: torch's function in its traceback."""
    name = "a collective"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.endswith("distributed_c10d.py") and frame.name not in _INTERNAL_FRAMES:
            return frame.name
        if "/deepspeed/" in frame.filename and frame.name == "wait":
            name = "an asynchronous collective"
    return name
