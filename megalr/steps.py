"""Command lines run in order, each only when what it would make is not there yet."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalr.errors import UserError


@dataclass(frozen=True)
class Step:
    """One command line, what it reads and what it makes.

    ``outputs`` are files or folders; those in ``replaced`` are deleted before the command runs,
    for programs that do not write into a folder that is there. ``environment`` is added to the
    process's own. ``passing`` are words of the command that do not matter to the outputs.
    """

    name: str
    command: Sequence[str]
    outputs: Sequence[Path]
    inputs: Sequence[Path] = ()
    replaced: Sequence[Path] = ()
    environment: dict[str, str] = field(default_factory=dict)
    passing: Sequence[str] = ()

    def line(self) -> str:
        """The command as one would type it."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*words, shlex.join(self.command)])


def run_steps(steps: Sequence[Step], records: Path, programs: dict[str, str]) -> None:
    """Run the steps in order, printing each command; skip those that are done.

    A finished step leaves ``records/NAME.json`` with its command and the sizes and times of its
    inputs and outputs. It is skipped while all of that is unchanged and no step before it ran.
    ``programs`` maps the first word of a command to the program to start ("python" to this
    interpreter, say).

    Raises UserError when a command fails; what it printed says why.
    """
    records.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.name}"
        record = records / f"{step.name}.json"
        if record.exists() and _read(record) == _state(step):
            print(f"{head}: there already\n    {step.line()}", flush=True)
            continue
        for later in steps[number - 1 :]:
            (records / f"{later.name}.json").unlink(missing_ok=True)
        for path in step.replaced:
            shutil.rmtree(path, ignore_errors=True)
        print(f"{head}\n    {step.line()}", flush=True)
        started = time.perf_counter()
        program = [programs.get(step.command[0], step.command[0]), *step.command[1:]]
        code = subprocess.call(program, env={**os.environ, **step.environment})
        if code != 0:
            raise UserError(f"{step.name} failed with exit code {code}: {step.line()}")
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise UserError(f"{step.name} did not make {', '.join(missing)}: {step.line()}")
        record.write_text(json.dumps(_state(step)), encoding="utf-8")
        print(f"    done in {time.perf_counter() - started:.0f} s", flush=True)


def _state(step: Step) -> dict[str, Any]:
    return {
        "command": [word for word in step.command if word not in step.passing],
        "environment": step.environment,
        "inputs": {str(path): _contents(path) for path in step.inputs},
        "outputs": {str(path): _contents(path) for path in step.outputs},
    }


def _contents(path: Path) -> list[list[Any]]:
    """[name, bytes, time of last change] of a file or of every file of a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [
        [p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns]
        for p in files
        if p.exists()
    ]


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
