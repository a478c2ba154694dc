"""Errors that a user can cause, and how a command line shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what is wrong, the value seen, what to do."""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and end the process with its exit code.

    A :class:`UserError` becomes one line ``error: ...`` on standard error and exit code 2; Ctrl-C
    becomes exit code 130. Every other exception is a defect and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)
