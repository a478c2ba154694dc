"""Batch scripts for SLURM: a shipped template with another header, given to sbatch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from megalr.errors import UserError

TIME = re.compile(r"\d+|(\d+-)?\d+(:\d+){1,2}|\d+-\d+", re.ASCII)


def check_time(text: str) -> None:
    """Refuse what SLURM does not read as a time limit.

    Raises:
        UserError: shows the value and the forms.
    """
    if not TIME.fullmatch(text):
        raise UserError(f"--time is {text!r}: give D-HH:MM:SS, HH:MM:SS or minutes")


def fill_header(
    template: str,
    options: Mapping[str, object],
    head: Sequence[str],
    own_names: Mapping[str, str],
) -> str:
    """A batch script with these options of sbatch, and these lines of bash behind its header.

    Every value of an option enters the script here. What the lines hold must be quoted already.

    Args:
        template: the script; a line ``#SBATCH --NAME=...`` is replaced, a new one goes to the end.
        options: value by sbatch's name; None keeps the template's.
        head: lines of bash.
        own_names: names in messages, where the program's option is called otherwise.

    Raises:
        UserError: a value is not one word, or the script is not UTF-8.
    """
    lines = template.splitlines()
    for name, value in options.items():
        if value is None:
            continue
        line = _option(name, value, own_names)
        places = [n for n, old in enumerate(lines) if old.startswith(f"#SBATCH --{name}=")]
        if places:
            lines[places[0]] = line
        else:
            lines.insert(_last_option(lines) + 1, line)
    lines[_last_option(lines) + 1 : _last_option(lines) + 1] = head
    script = "\n".join(lines) + "\n"
    try:
        script.encode()
    except UnicodeEncodeError as error:
        character = script[error.start]
        raise UserError(
            f"an argument or the recipe's name is not UTF-8 ({character!r}): rename the file"
        ) from error
    return script


def _option(name: str, value: object, own_names: Mapping[str, str]) -> str:
    """A line of the header; a line break in the value would end it and begin a command."""
    text = str(value)
    if not text.isprintable() or not re.fullmatch(r"[^\s\"'#\\]+", text):
        raise UserError(
            f"--{own_names.get(name, name)} is {text!r}: SLURM takes one word without spaces, "
            "quotes, # and \\"
        )
    return f"#SBATCH --{name}={text}"


def _last_option(lines: list[str]) -> int:
    return max(n for n, line in enumerate(lines) if line.startswith("#SBATCH "))


def submit_script(script: str, *options: str) -> str:
    """Give a script to sbatch; what it prints.

    Raises:
        UserError: there is no sbatch here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: submit on a login node of the cluster, or see the script by "
            "a dry run"
        )
    done = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout
