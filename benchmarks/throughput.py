"""Training speed and memory of the real path: launcher, engine, loader, compiled blocks.

    python benchmarks/throughput.py --cases 60m_low_rank 350m_low_rank --output benchmarks/results

Each case is one run of ``launchers/pretrain.py`` on random tokens (or ``--data``), a process for
each GPU. Reported: the median and the spread over the logged intervals after warm-up, peak memory
beside its estimate, seconds from start to the first update, and of these what torch.compile took.
``--sequence`` runs every case at other lengths than 256, with as many tokens a micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from cases import CASES, Case, at_length, stage_of

from megalr.config.schema import RunConfig
from megalr.data.manifest import DataManifest, ShardEntry, SourceInfo, TokenizerInfo
from megalr.errors import UserError, exit_cleanly
from megalr.estimate.memory import GIB, estimate_memory
from megalr.files import sha256_of_file, write_atomic
from megalr.preprocessing.shard_writer import ShardWriter

LONGEST_SECONDS = 300
"""After which a case counts as failed."""

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = ("stage", "tensor", "accumulation", "micro_batch", "layout")
"""Fields of a case that options of the same name replace."""


TARGETS: dict[str, tuple[int, float]] = {
    "60m_low_rank_paper": (1_800_000, 6),
    "350m_low_rank_paper": (370_000, 14),
    "1b_low_rank_paper": (145_000, 30),
    "1b_sltrain_paper": (50_000, 32),
    "1b_full_rank_paper": (70_000, 34),
}
"""Tokens/s at least and GiB at most on one H200 (a shared list of goals, not a test)."""


def random_data(
    folder: Path, tokens: int = 20_000_000, vocab_size: int = 32000, document: int = 1000
) -> Path:
    """A data set of uniformly random ids, so that nothing but speed can be learned from it.

    ``document``: tokens of each document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.model", b"random")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train-00000", vocab_size) as writer:
        lengths = np.full(tokens // document, document, np.int32)
        writer.add(rng.integers(3, vocab_size, size=int(lengths.sum())), lengths)
        done = writer.finish()
    entry = ShardEntry(
        name="train-00000", split="train", source=SourceInfo("random", 0, ""), **asdict(done)
    )
    tokenizer = TokenizerInfo(
        "tokenizer.model",
        "sentencepiece",
        sha256_of_file(folder / "tokenizer.model"),
        vocab_size,
        1,
        0,
    )
    DataManifest(tokenizer, True, "uint16", (entry,)).save(folder)
    return folder


def run_settings(
    case: Case, folder: Path, data: Path, gpus: int, updates: int, log_every: int | None = None
) -> dict[str, Any]:
    """The configuration of a case's run; without ``log_every`` it logs ten times."""
    return {
        "run": {"dir": str(folder)},
        "model": {"preset": case.preset},
        "method": case.method,
        "optimizer": case.optimizer,
        "parallel": {"tensor": case.tensor, "layout": case.layout},
        "restarts": case.restarts,
        "schedule": {"warmup_updates": 10},
        "data": {"train": str(data), "sequence_length": case.sequence},
        "train": {
            "updates": 100 * updates,  # more than will be made, see run_until
            "global_batch_size": case.micro_batch * case.accumulation * gpus // case.tensor,
            "micro_batch_size": case.micro_batch,
            "precision": case.precision,
            "compile": True,
            "cuda_graphs": True,
            "gradient_clipping": 0.0,
            **case.train,
        },
        "checkpoint": {"every": 0},
        "log": {"every": log_every or max(1, updates // 10), "tensorboard": False},
    }


def changed(case: Case, arguments: argparse.Namespace, sequence: int | None = None) -> Case:
    """The case with what the command line gives instead, at one of the lengths it gives."""
    given = {key: getattr(arguments, key) for key in OVERRIDES}
    if sequence is not None:
        case = at_length(case, sequence)
    case = replace(case, **{key: value for key, value in given.items() if value is not None})
    return replace(
        case,
        train={**case.train, **arguments.train},
        zero={**case.zero, **arguments.zero},
        optimizer={**case.optimizer, **arguments.optimizer},
    )


def run_case(name: str, case: Case, data: Path, work: Path, arguments: argparse.Namespace) -> dict:
    """Run one case; return its numbers."""
    folder, gpus, updates = work / name, arguments.gpus, arguments.updates
    config = run_settings(case, folder, data, gpus, updates, arguments.log_every)
    paths = work / f"{name}.yaml", work / f"{name}.json"
    paths[0].write_text(yaml.safe_dump(config))
    paths[1].write_text(json.dumps({"zero_optimization": {"stage": stage_of(case), **case.zero}}))
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(paths[0])]
    command += ["--deepspeed_config", str(paths[1])]
    log = work / f"{name}.log"
    launched = time.time()
    with log.open("w") as output:
        run_until(command, gpus, folder / "metrics.jsonl", updates, output)
    if steps_done(folder / "metrics.jsonl") < updates:
        raise UserError(f"case {name} failed:\n{log.read_text()[-4000:]}")
    found = summary(name, case, folder / "metrics.jsonl", gpus, launched)
    return {**found, **estimated(case, config, gpus, found)}


def run_until(command: list[str], gpus: int, metrics: Path, updates: int, output: IO[str]) -> None:
    """Run the command, a process for each GPU, until its metrics say that the updates are done.

    Then all are killed: a run that ended by itself would write a checkpoint first, 50 GB at 7B. The
    processes are started here because those of torchrun outlive a kill of torchrun.
    """
    give_up = time.monotonic() + LONGEST_SECONDS
    port = free_port()
    ranks = []
    try:
        for rank in range(gpus):
            environment = {**os.environ, **variables_of(rank, gpus, port)}
            ranks.append(
                subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                )
            )
        while all(r.poll() is None for r in ranks) and steps_done(metrics) < updates:
            if time.monotonic() > give_up:
                break
            time.sleep(0.3)
    finally:  # also when this program is told to end: the run would go on and disturb the next
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def variables_of(rank: int, gpus: int, port: str) -> dict[str, str]:
    """What a launcher tells a rank; nothing to the only one."""
    if gpus == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(gpus),
        "LOCAL_WORLD_SIZE": str(gpus),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def steps_done(metrics: Path) -> int:
    """Updates that the metrics report."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    return max((json.loads(line)["update"] for line in lines), default=0)


def free_port() -> str:
    """A port nobody listens on, so that several of these programs can run on one machine."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def summary(name: str, case: Case, metrics: Path, gpus: int, launched: float) -> dict[str, Any]:
    """Median and spread of the step lines after the first three; times from ``launched`` on."""
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    start = next(event for event in events if event["event"] == "start")
    compiled = next((event for event in events if event["event"] == "compile"), None)
    rates = [step["tokens_per_second"] for step in steps[3:]]
    return {
        "case": name,
        **asdict(case),
        "stage": stage_of(case),
        "gpus": gpus,
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "update_seconds": round(statistics.median(step["step_seconds"] for step in steps[3:]), 5),
        "mfu": _median([step["mfu"] for step in steps[3:]]),
        "peak_memory_gib": round(max(step["peak_memory_gib"] for step in steps), 2),
        "startup_seconds": start["startup_seconds"],
        "compile_seconds": round(compiled["compile_seconds"], 2) if compiled else 0.0,
        "kernel_seconds": compiled and compiled["kernel_seconds"],
        "launch_to_first_update_seconds": (  # imports, compilation and all
            round(compiled["time"] - launched, 2) if compiled else None
        ),
        "data_seconds": round(statistics.median(step["data_seconds"] for step in steps[3:]), 6),
        "first_interval_seconds": round(steps[0]["step_seconds"] * steps[0]["update"], 2),
        "restart_seconds": [
            round(event["refactorize_seconds"] + event["reset_seconds"], 4)
            for event in events
            if event["event"] == "restart"
        ],
        "losses": [round(step["loss"], 5) for step in steps],
        "versions": start["versions"],
    }


def estimated(
    case: Case, config: dict[str, Any], gpus: int, found: dict[str, Any]
) -> dict[str, float]:
    """The estimate of the peak in GiB, and by how many percent it exceeds the measured one."""
    ds_user = {"zero_optimization": {"stage": stage_of(case), **case.zero}}
    hopper = any(name in found["versions"]["device"] for name in ("H100", "H200", "H800"))
    run = RunConfig.model_validate(config)
    peak = estimate_memory(run, ds_user, "benchmarks/throughput.py", gpus, hopper).peak / GIB
    measured = found["peak_memory_gib"]
    error = round(100 * (peak / measured - 1), 1) if measured else float("nan")
    return {"estimated_memory_gib": round(peak, 2), "estimate_error_percent": error}


def _median(values: list[float | str]) -> float | str:
    """Of numbers; the metrics say ``n/a`` where the device's peak is not known."""
    numbers = [value for value in values if not isinstance(value, str)]
    return statistics.median(numbers) if numbers else "n/a"


def main() -> None:
    """Run the chosen cases and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        metavar="CASE",
        default=list(CASES),
        help="default: all",
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this machine")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--log_every", type=int, help="updates between two lines of metrics")
    parser.add_argument("--stage", type=int, help="ZeRO stage instead of the case's")
    parser.add_argument("--tensor", type=int, help="tensor-parallel GPUs instead of the case's")
    parser.add_argument("--accumulation", type=int, help="micro-batches instead of the case's")
    parser.add_argument(
        "--zero", type=json.loads, default={}, help="more keys of zero_optimization, as JSON"
    )
    parser.add_argument("--train", type=json.loads, default={}, help="more keys of train, as JSON")
    parser.add_argument(
        "--optimizer", type=json.loads, default={}, help="more keys of optimizer, as JSON"
    )
    parser.add_argument("--layout", help="of tensor parallelism, instead of the case's")
    parser.add_argument("--micro_batch", type=int, help="sequences instead of the case's")
    parser.add_argument(
        "--sequence",
        type=int,
        nargs="+",
        help="lengths instead of 256, each a run; the tokens of a micro-batch stay",
    )
    parser.add_argument("--data", type=Path, help="preprocessed data set (default: random tokens)")
    parser.add_argument("--commit", default="unknown", help="commit to note in the result")
    parser.add_argument("--name", default="throughput", help="first part of the result's name")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = []
    with tempfile.TemporaryDirectory() as work:
        lengths: list[int | None] = arguments.sequence or [None]
        longest = max((length for length in lengths if length), default=0)
        data = arguments.data or random_data(Path(work) / "data", document=max(1000, longest))
        for name, length in itertools.product(arguments.cases, lengths):
            case = changed(CASES[name], arguments, length)
            try:
                folder = Path(work) / str(length or "case")
                folder.mkdir(exist_ok=True)
                result = run_case(name, case, data, folder, arguments)
            except UserError as error:
                print(error, flush=True)
                continue
            print(json.dumps(result), flush=True)
            results.append({**result, "commit": arguments.commit})
            path = arguments.output / f"{arguments.name}_{arguments.gpus}gpu.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if len(results) < len(arguments.cases) * len(lengths):
        failed = len(arguments.cases) * len(lengths) - len(results)
        raise UserError(f"{failed} of the runs failed, see above")


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, beside what is to be reached."""
    lines = [
        "| case | sequence | tokens/s | range | at least | ms an update | MFU | GiB | at most | "
        "estimate | error % | start-up s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        speed, memory = TARGETS.get(r["case"] if r["sequence"] == 256 else "", ("", ""))
        low, high = r["tokens_per_second_range"]
        mfu = r["mfu"] if isinstance(r["mfu"], str) else f"{r['mfu']:.3f}"
        lines.append(
            f"| {r['case']} | {r['sequence']} | {r['tokens_per_second']:,} | {low:,} to {high:,} | "
            f"{speed} | {1e3 * r['update_seconds']:.2f} | {mfu} | {r['peak_memory_gib']} | "
            f"{memory} | {r['estimated_memory_gib']} | {r['estimate_error_percent']} | "
            f"{r['startup_seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_cleanly(main)
