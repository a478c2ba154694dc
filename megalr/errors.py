"""Errors that a user can cause, and how a command line shows them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

PEER_SECONDS = 2.0
"""How long a silent rank waits before it ends: launchers kill all ranks as soon as one is gone."""


class UserError(ValueError):
    """A mistake of the user: one line saying what is wrong, the value seen, what to do."""


class AgreedError(UserError):
    """A UserError that every rank raises, so that rank 0's word is enough."""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and end the process with its exit code.

    A :class:`UserError` becomes one line ``error: ...`` on standard error and exit code 2; Ctrl-C
    becomes exit code 130. Every other exception is a defect and keeps its traceback. Of an
    :class:`AgreedError` only rank 0 (variable RANK) speaks; the others give it time to.
    """
    try:
        code = main()
    except UserError as error:
        if isinstance(error, AgreedError) and os.environ.get("RANK", "0") != "0":
            time.sleep(PEER_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)
