"""``megalr COMMAND ...``: help over all commands, and the start of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megalr.cli.command_line import did_you_mean
from megalr.cli.commands import COMMANDS
from megalr.errors import UserError, exit_cleanly
from megalr.version import __version__

USAGE = """\
usage: megalr COMMAND ...

Pretraining of language models whose weights are stored as factors, on DeepSpeed.
"""
FOOTER = """
`megalr COMMAND --help` explains a command. Settings of a run are written section.key=value;
`megalr keys` explains them.
"""


def help_text() -> str:
    """All commands by group, each with an example."""
    lines, group = [USAGE], None
    for command in COMMANDS.values():
        if command.group != group:
            group = command.group
            lines.append(f"{group}:")
        lines += [f"  {command.name:<11} {command.summary}", f"{'':14}{command.example}"]
    return "\n".join([*lines, FOOTER.rstrip()])


def main(words: Sequence[str] | None = None) -> int | None:
    """Run the command that the first word names; returns its exit code.

    Args:
        words: the command line; None: this process's own.

    Raises:
        UserError: there is no such command; names the nearest.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"megalr {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"megalr has no command {name!r}{hint}")
    return COMMANDS[name].run(rest, f"megalr {name}")


def console() -> None:
    """Entry point of the installed command; ends the process."""
    try:
        exit_cleanly(main)
    except BrokenPipeError:  # `megalr keys | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(1)


if __name__ == "__main__":
    console()
