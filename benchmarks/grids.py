"""Grids of ranks against one rank: losses, speed, and checkpoints resumed in another grid.

    python benchmarks/throughput.py --gpus 1 --name one --accumulation 2 ...      the one rank
    python benchmarks/throughput.py --gpus 4 --name grid --tensor 2 ...           the grid
    python benchmarks/grids.py compare --one results/one_1gpu.json --grids results/grid_4gpu.json
    python benchmarks/grids.py resume --gpus 4 --preset llama_1b --data DATA --output results

``compare`` prints, for each run of the grids, the largest difference of its losses from those of
the one rank, and its speed beside the scaling model's. ``resume`` trains 6 updates with restarts
on TP 2 x DP and goes on from the checkpoint of update 4 with other grids; the losses should agree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from record import provenance, save
from scaling.points import Measured, fit, recorded, recorded_rows
from throughput import ROOT, free_port, variables_of

from megalr.errors import UserError, exit_cleanly
from megalr.estimate.cluster import H200
from megalr.estimate.update_time import predict

UPDATES, SAVED = 6, 4
"""Updates of a run of ``resume``, and the checkpoint from which the others go on."""


def compare(one: Path, grids: list[Path]) -> str:
    """Table of the runs of several ranks beside one rank and the scaling model.

    Raises:
        UserError: a run has no counterpart of the same case and global batch on one rank.
    """
    alone = {_identity(row): row for row in json.loads(one.read_text())}
    gpu = fit([run for run in recorded() if run.job.gpus == 1])
    lines = [
        "| run | GPUs | TP | ZeRO | updates | largest difference of the loss | tokens/s "
        "| predicted | error % | GiB per GPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in grids:
        for row in json.loads(path.read_text()):
            if _identity(row) not in alone:
                raise UserError(
                    f"{path}: {row['case']} has no run of the same batch in {one}: make it with "
                    "--gpus 1 and an --accumulation larger by the number of copies"
                )
            lines.append(_line(row, alone[_identity(row)], recorded_rows([row]), gpu))
    return "\n".join(lines)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a run and its counterpart have in common: the model and the sequences of an update."""
    copies = row["gpus"] // row["tensor"]
    model = row["preset"], json.dumps(row["method"], sort_keys=True)
    return (*model, row["micro_batch"] * row["accumulation"] * copies)


def _line(row: dict[str, Any], one: dict[str, Any], measured: list[Measured], gpu: Any) -> str:
    pairs = list(zip(row["losses"], one["losses"], strict=False))
    difference = max(abs(ours - theirs) for ours, theirs in pairs)
    predicted, error = "", ""
    if measured:
        rate = measured[0].job.tokens / predict(measured[0].job, gpu, H200).total
        predicted = f"{rate:,.0f}"
        error = f"{100 * (rate / row['tokens_per_second'] - 1):+.1f}"
    return (
        f"| {row['case']} | {row['gpus']} | {row['tensor']} | {row['stage']} | {len(pairs)} | "
        f"{difference:.5f} | {row['tokens_per_second']:,} | {predicted} | {error} | "
        f"{row['peak_memory_gib']} |"
    )


def resume(arguments: argparse.Namespace) -> None:
    """Train on TP 2 x DP, go on in other grids, record the losses of all."""
    gpus = arguments.gpus
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        first = Path(work) / "first"
        losses = {f"TP 2 x DP {gpus // 2}": _losses(first, 2, arguments)}
        for tensor in (gpus, 1):
            folder = Path(work) / f"tensor_{tensor}"
            shutil.copytree(first, folder)
            (folder / "metrics.jsonl").unlink()
            name = f"from update {SAVED} with TP {tensor} x DP {gpus // tensor}"
            losses[name] = _losses(folder, tensor, arguments)
            shutil.rmtree(folder)
    print(json.dumps(losses, indent=1))
    settings = {"preset": arguments.preset, "gpus": gpus, "rank": arguments.rank}
    result = {**provenance(("torch", "deepspeed")), **settings, "losses": losses}
    save(f"grid_resume_{gpus}gpu", result, arguments.output)


def _losses(folder: Path, tensor: int, arguments: argparse.Namespace) -> dict[int, float]:
    """Loss of each update that this start of the run makes."""
    config = {
        "run": {"dir": str(folder)},
        "model": {"preset": arguments.preset},
        "method": {"name": "low_rank", "rank": arguments.rank, "alpha": 32.0},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_updates": 2},
        "parallel": {"tensor": tensor},
        "restarts": {"every": 2, "verify": True},
        "data": {"train": str(arguments.data), "sequence_length": arguments.sequence_length},
        "train": {
            "updates": UPDATES,
            "global_batch_size": 16 * arguments.gpus,
            "micro_batch_size": 8,
            "precision": arguments.precision,
        },
        "checkpoint": {"every": SAVED, "at_end": False, "verify": False},
        "log": {"every": 1, "tensorboard": False},
    }
    recipe, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    recipe.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(recipe)]
    port = free_port()
    with log.open("w") as output:
        ranks = [
            subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **variables_of(rank, arguments.gpus, port)},
            )
            for rank in range(arguments.gpus)
        ]
        codes = [process.wait() for process in ranks]
    if any(codes):
        raise UserError(f"a run with TP {tensor} ended with {codes}:\n{log.read_text()[-2000:]}")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {event["update"]: event["loss"] for event in events if event["event"] == "step"}


def main() -> None:
    """Compare recorded runs, or make the runs that resume in other grids."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    comparison = commands.add_parser("compare")
    comparison.add_argument("--one", type=Path, required=True, help="result of one GPU")
    comparison.add_argument("--grids", type=Path, nargs="+", required=True, help="of several")
    resumption = commands.add_parser("resume")
    add = resumption.add_argument
    add("--gpus", type=int, required=True, help="ranks, a multiple of 2")
    add("--preset", default="llama_1b")
    add("--rank", type=int, default=512)
    add("--sequence_length", type=int, default=256)
    add("--precision", default="bf16")
    add("--data", type=Path, required=True, help="preprocessed data set")
    add("--work", type=Path, help="folder of the runs (default: the system's)")
    add("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        print(compare(arguments.one, arguments.grids))
    else:
        resume(arguments)


if __name__ == "__main__":
    exit_cleanly(main)
