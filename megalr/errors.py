"""Errors that a user can cause, and how a command line shows them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

PEER_SECONDS = 2.0
"""How long a silent rank waits before it ends: launchers kill all ranks as soon as one is gone."""


RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


class UserError(ValueError):
    """A mistake of the user: one line saying what is wrong, the value seen, what to do."""


class AgreedError(UserError):
    """A UserError that every rank raises, so that rank 0's word is enough."""


class PeerLost(Exception):
    """Another process of the run no longer answers; one line. Not a mistake of the user."""


def launched_number(names: tuple[str, ...]) -> int:
    """This process's number from the first of these variables that a launcher set; 0 without."""
    values = [os.environ[name] for name in names if name in os.environ]
    return int(values[0]) if values and values[0].isdigit() else 0


def _is_lack_of_memory(error: Exception) -> bool:
    """Python's, numpy's, or torch's on GPU and CPU; torch is not imported for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "Storage size calculation overflowed" in str(error)
    )


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and end the process with its exit code.

    A :class:`UserError` becomes one line ``error: ...`` on standard error and exit code 2; Ctrl-C
    becomes exit code 130; a :class:`PeerLost` one line and exit code 1; a lack of memory one line
    and exit code 2. Every other exception is a defect and keeps its traceback. Of an
    :class:`AgreedError` only rank 0 speaks; the others give it time to.
    """
    try:
        code = main()
    except UserError as error:
        if isinstance(error, AgreedError) and launched_number(RANK_VARIABLES) != 0:
            time.sleep(PEER_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        print(
            f"error: rank {launched_number(RANK_VARIABLES)}: out of memory ({reason}): lower the "
            "micro-batch size or the sequence length, or use more GPUs; tools/estimate_memory.py "
            "says what a run needs",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)
