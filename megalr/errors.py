"""Errors that a user can cause, and how a command line reports them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

PEER_SECONDS = 2.0
"""How long other ranks wait for rank 0 to print: launchers kill all ranks when one exits."""

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
LOCAL_RANK_VARIABLES = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)


class UserError(ValueError):
    """A mistake of the user. One line: what is wrong, the value seen, what to do."""


class AgreedError(UserError):
    """A UserError that every rank raises; only rank 0 prints it."""


class PeerLost(Exception):
    """A peer process no longer answers. One line; not a mistake of the user."""


def launched_number(names: tuple[str, ...]) -> int:
    """This process's number from the first of these variables that is set; 0 if none is."""
    values = [os.environ[name] for name in names if name in os.environ]
    return int(values[0]) if values and values[0].isdigit() else 0


def _is_lack_of_memory(error: Exception) -> bool:
    """Recognises Python's, numpy's and torch's out-of-memory errors without importing torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "Storage size calculation overflowed" in str(error)
    )


def _print_error(text: str) -> None:
    """One line on standard error; a log on a full disk must not change the exit code."""
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr, flush=True)


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and end the process with its exit code.

    A :class:`UserError` becomes one line ``error: ...`` on standard error and exit code 2; Ctrl-C
    becomes exit code 130; a :class:`PeerLost` one line and exit code 1; running out of memory one
    line and exit code 2. Any other exception is a defect and keeps its traceback. An
    :class:`AgreedError` is printed by rank 0 only; the other ranks wait :data:`PEER_SECONDS`.
    """
    try:
        code = main()
    except UserError as error:
        if isinstance(error, AgreedError) and launched_number(RANK_VARIABLES) != 0:
            time.sleep(PEER_SECONDS)
        else:
            _print_error(str(error))
        sys.exit(2)
    except PeerLost as error:
        _print_error(str(error))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        _print_error(
            f"rank {launched_number(RANK_VARIABLES)}: out of memory ({reason}): lower the "
            "micro-batch size or the sequence length, or use more GPUs; `megalr memory` "
            "says what a run needs"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        _print_error("interrupted")
        sys.exit(130)
    sys.exit(code or 0)
