"""ZeRO 3 and offload on the GPUs of one host, beside ZeRO 2 and beside plain DeepSpeed.

    python benchmarks/sharded.py --gpus 2 --output results

Runs, one after the other: 1B low_rank with ZeRO 2, with ZeRO 3 compiled and not, and with ZeRO 2
again; the same with 512 sequences an update and the optimizer in the host's memory; 7B full_rank
with ZeRO 3, by megalr and by plain DeepSpeed and transformers. Prints each run's speed as a part of
what it is compared with, beside the goal. Each measurement can also be made alone: the commands are
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from throughput import ROOT

from megalr.errors import UserError, exit_cleanly

SEQUENCES = 512
"""Of an update with offload: enough micro-batches for the optimizer's step to be a small part."""


@dataclass(frozen=True)
class Run:
    """One measurement: name, arguments of throughput.py ("" = the peer), what it is compared with.

    ``goal``: the least part of the other's tokens/s, or None.
    """

    name: str
    arguments: str
    against: str = ""
    goal: float | None = None


def runs(gpus: int) -> list[Run]:
    """All measurements, in order; those with ZeRO 2 come before and after ZeRO 3."""
    accumulation = max(1, SEQUENCES // (64 * gpus))
    many = f"--accumulation {accumulation}"
    zero2 = "--stage 2 --cases 1b_low_rank"
    return [
        Run("zero2", zero2),
        Run("zero3", "--cases 1b_low_rank_zero3", "zero2", 0.7),
        Run("zero3_plain", "--cases 1b_low_rank_zero3_plain", "zero2"),
        Run("zero2_again", zero2, "zero2"),
        Run("zero2_many", f"{zero2} {many}"),
        Run("zero3_many", f"--cases 1b_low_rank_zero3 {many}", "zero2_many", 0.7),
        Run("offload", "--cases 1b_low_rank_offload", "zero2"),
        Run("offload_many", f"--cases 1b_low_rank_offload {many}", "zero2_many", 0.6),
        Run("peer_7b", ""),
        Run("zero3_7b", "--cases 7b_full_rank_zero3", "peer_7b"),
        Run("zero3_7b_plain", "--train {compile:false} --cases 7b_full_rank_zero3", "peer_7b"),
    ]


def command_of(run: Run, arguments: argparse.Namespace) -> list[str]:
    """The program that measures a run on all GPUs."""
    common = ["--updates", str(arguments.updates), "--output", str(arguments.output)]
    if not run.arguments:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(arguments.gpus)]
        return [*launcher, str(ROOT / "benchmarks" / "peer_deepspeed.py"), *common]
    words = run.arguments.replace("{compile:false}", '{"compile":false}').split()
    program = [sys.executable, str(ROOT / "benchmarks" / "throughput.py")]
    return [*program, "--gpus", str(arguments.gpus), "--name", run.name, *common, *words]


def row_of(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run's program has written."""
    if not run.arguments:
        name = f"peer_7b_full_rank_zero3_{arguments.gpus}gpu.json"
        return json.loads((arguments.output / name).read_text())
    path = arguments.output / f"{run.name}_{arguments.gpus}gpu.json"
    return json.loads(path.read_text())[0]


def table(found: dict[str, dict[str, Any]], order: list[Run]) -> str:
    """The runs that worked as a Markdown table."""
    lines = [
        "| run | tokens/s | range | GiB | part of | | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in (run for run in order if run.name in found):
        row = found[run.name]
        low, high = row["tokens_per_second_range"]
        part = ""
        if run.against in found:
            other = statistics.fmean(
                found[name]["tokens_per_second"]
                for name in (run.against, f"{run.against}_again")
                if name in found and name != run.name
            )
            part = f"{row['tokens_per_second'] / other:.3f}"
        lines.append(
            f"| {run.name} | {row['tokens_per_second']:,} | {low:,} to {high:,} | "
            f"{row['peak_memory_gib']} | {run.against} | {part} | {run.goal or ''} |"
        )
    return "\n".join(lines)


def measure(
    arguments: argparse.Namespace, call: Callable[[list[str], dict[str, str]], int]
) -> dict[str, dict[str, Any]]:
    """Every chosen run by name; ``call`` starts a program with an environment."""
    found = {}
    # torch's AdamW of the host takes all cores for each rank, or one under torchrun.
    threads = str(max(1, len(os.sched_getaffinity(0)) // arguments.gpus))
    for run in runs(arguments.gpus):
        if arguments.only and run.name not in arguments.only:
            continue
        command = command_of(run, arguments)
        print(shlex.join(command), flush=True)
        if call(command, {**os.environ, "OMP_NUM_THREADS": threads}) == 0:
            found[run.name] = row_of(run, arguments)
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs only")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    found = measure(arguments, lambda command, env: subprocess.run(command, env=env).returncode)
    order = runs(arguments.gpus)
    print(table(found, order))
    wanted = [run.name for run in order if not arguments.only or run.name in arguments.only]
    if failed := [name for name in wanted if name not in found]:
        raise UserError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    exit_cleanly(main)
