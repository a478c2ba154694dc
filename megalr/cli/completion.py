"""``megalr completion``: a script with which a shell completes commands, options, keys, recipes.

shtab writes it from the parsers. The script is static: nothing of megalr runs when Tab is pressed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megalr.cli.command_line import new_parser, packaged_names, parse
from megalr.cli.commands import COMMANDS

SHELLS = ("bash", "zsh", "fish")
PATHS = ("input", "data", "run", "runs", "model", "folder", "output")
"""Arguments that are files or folders though they are kept as text."""
BASH_ENDING = """
_megalr_without_space() {
  _shtab_megalr
  if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _megalr_without_space megalr
"""
"""A key ends in "=", behind which the value follows without a space."""


def completion_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr completion``."""
    parser = new_parser(
        "completion",
        prog,
        "Put the script where your shell looks for it: ~/.local/share/bash-completion/completions/"
        "megalr, a folder of zsh's fpath as _megalr, or ~/.config/fish/completions/megalr.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def completion_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the script."""
    shell = parse(completion_parser(prog), words).shell
    print(completion_script(shell))


def completion_script(shell: str) -> str:
    """The script for one of SHELLS."""
    import shtab

    from megalr.config.key_tables import key_tables

    keys = dict.fromkeys(
        f"{row.key}=" for table in key_tables() if not table.items for row in table.rows
    )
    completers = {
        "overrides": _words("keys", keys, files=False),
        "config": _words("recipes", packaged_names("recipe"), files=True),
        "deepspeed_config": _words("deepspeed", packaged_names("DeepSpeed JSON"), files=True),
    }
    parser = argparse.ArgumentParser(prog="megalr")
    commands = parser.add_subparsers()
    for command in COMMANDS.values():
        own = command.parser()
        for action in own._actions:
            if action.dest in completers:
                action.complete = completers[action.dest]  # type: ignore[attr-defined]
            elif action.type is Path or action.dest in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            parents=[own],
            add_help=False,
        )
    script = shtab.complete(parser, shell)
    return script + BASH_ENDING if shell == "bash" else script


def _words(name: str, words: Iterable[str], files: bool) -> dict[str, Any]:
    """shtab's description of an argument that is one of ``words``.

    With ``files`` it may also be a file, and overrides may follow it: keys are offered as soon as
    a word has begun.
    """
    function, listed = f"_megalr_{name}", shlex.join(words)
    bash = f'compgen -W "{listed}" -- "$1"'
    zsh = f"compadd -S '' -- {listed}"
    fish = listed
    if files:
        bash += '\n  compgen -f -- "$1"\n  if [[ -n $1 ]]; then _megalr_keys "$1"; fi'
        zsh = f"compadd -- {listed}\n  _files\n  [[ -n $PREFIX ]] && _megalr_keys"
        fish += " (__fish_complete_path (commandline -ct))"
    return {
        "bash": function,
        "zsh": function,
        "fish": fish,
        "preamble": {
            "bash": f"{function}() {{\n  {bash}\n}}",
            "zsh": f"{function}() {{\n  {zsh}\n}}",
        },
    }
