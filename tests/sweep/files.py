"""Sweep files, made-up results, and a stand-in for the training program that takes no time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from megalr.sweep.grid import PlannedRun, Scope, plan_runs
from megalr.sweep.local import LocalOptions
from megalr.sweep.results import Row
from megalr.sweep.sweep_file import read_sweep_file
from tests.training.runs import SETTINGS

BASE: dict[str, Any] = {
    **SETTINGS,
    "run": {"dir": "unused", "seed": 7},
    "data": {**SETTINGS["data"], "train": "data"},
    "schedule": {"warmup_updates": 1},
    "train": {**SETTINGS["train"], "updates": 3},
    "evaluation": {"every": 2},
    "checkpoint": {"every": 0, "at_end": False},
}

STAND_IN = '''
"""Writes the events of a run; the learning rate says what becomes of it."""
import json, os, re, signal, sys, time
from pathlib import Path

text = " ".join(sys.argv)
folder = Path(json.loads(re.search(r'run.dir=("[^"]*")', text)[1]))
rate = float(re.search(r"optimizer.lr=(\\S+)", text)[1])
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
with (folder / "metrics.jsonl").open("a") as file:
    def write(event, update, **fields):
        file.write(json.dumps({"event": event, "update": update, **fields}) + "\\n")
        file.flush()
    write("start", 0, environment=dict(os.environ))
    (folder / "config.yaml").write_text("run: {}")
    write("step", 1, loss=2.0, tokens=10, step_seconds=0.5, tokens_per_second=20.0)
    if rate == 3:
        print("error: no luck with 3", flush=True)
        sys.exit(2)
    if rate == 4 and len((folder / "metrics.jsonl").read_text().splitlines()) < 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if rate == 5:
        write("skip", 2, reason="non_finite", skipped_in_row=10)
        print("error: 10 updates in a row were skipped")
        sys.exit(2)
    if rate == 6:
        while not stops:
            time.sleep(0.02)
        sys.exit(75)
    write("eval", 1, loss=rate, perplexity=100 * rate)
    write("end", 1, reason="finished")
'''
"""1, 2: finishes. 3: fails. 4: is killed at its first start. 5: diverges. 6: runs until stopped."""


def write_sweep(folder: Path, **sections: Any) -> Path:
    """A sweep file with the tiny base run beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    base = {**BASE, "data": {**BASE["data"], "train": str(folder / "data")}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    path = folder / "tiny.yaml"
    values = {"base": "base.yaml", **sections}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def rates(*values: float) -> dict[str, Any]:
    """The groups of a sweep over learning rates."""
    return {"g": {"axes": {"lr": {"key": "optimizer.lr", "values": list(values)}}}}


def plan(path: Path, output: Path, **scope: Any) -> list[PlannedRun]:
    """The runs of a sweep file."""
    return plan_runs(read_sweep_file(path), [path.parent], output, Scope(**scope))


def stand_in(folder: Path, **options: Any) -> LocalOptions:
    """Options that start the stand-in, two runs at a time."""
    program = folder / "stand_in.py"
    program.write_text(STAND_IN, encoding="utf-8")
    limits = {"deadline": None, "last_start": None}
    values = {"gpus": None, "per_gpu": 2, "retry_failed": False, **limits, **options}
    return LocalOptions(program=program, environment=dict(os.environ), **values)


def row(group: str, perplexity: float, seed: int = 1, status: str = "finished", **axes: str) -> Row:
    """A made-up result."""
    columns = {f"axis_{axis}": label for axis, label in axes.items()}
    name = "__".join((group, *(f"{a}={v}" for a, v in axes.items()), f"seed={seed}"))
    found = {"run": name, "group": group, "seed": seed, "status": status, "error": None}
    return {**found, "perplexity": perplexity if status == "finished" else None, **columns}
