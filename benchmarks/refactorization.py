"""Time, accuracy and memory of weight refactorization, beside the published way in the same run.

    python benchmarks/refactorization.py --output benchmarks/results
    torchrun --nproc_per_node 4 benchmarks/refactorization.py --output benchmarks/results

On one process three parts: single matrices (the published SVD of the materialised product, ours,
its QR path; errors of product and balance from and to fp32), all matrices of a model outside any
engine, and restarts inside the engine of a training run: seconds, share of the time of ``--period``
updates of ``--batch`` sequences, extra memory. On several processes the last part only, shared by
all ranks. Writes refactorization_<ranks>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.config.schema import RunConfig
from megalr.distributed.process_group import start_distributed
from megalr.engine.build import build_engine, set_learning_rate
from megalr.engine.config import resolve_deepspeed_config
from megalr.engine.state import EngineState
from megalr.errors import exit_cleanly
from megalr.layers.factors import FactorPair
from megalr.models.build import build_model
from megalr.models.config import decoder_config
from megalr.restarts.balance import balance_in_place, balanced_factors, balanced_factors_by_qr
from megalr.restarts.controller import Restarts
from megalr.restarts.refactorize import factor_parameters
from megalr.restarts.report import RestartReport
from megalr.restarts.rounds import workspace_of

RANKS = {"llama_9m": 32, "llama_60m": 128, "llama_350m": 256, "llama_1b": 512, "llama_7b": 1024}
MICRO_BATCH = {"llama_9m": 2, "llama_60m": 128, "llama_350m": 64, "llama_1b": 64}
SEQUENCE_LENGTH = 256
Shape = tuple[int, int]


def target_shapes(model: str) -> list[Shape]:
    """(m, n) of all factorized matrices of a model, the MLP width padded as it is stored."""
    sizes = decoder_config(model, {})
    h, f = sizes.hidden_size, sizes.padded_intermediate_size
    return ([(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]) * sizes.num_layers


def random_factors(
    shape: Shape, rank: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Gaussian B (m, r), A (r, n) in fp32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    b = torch.randn(shape[0], rank, device=device, generator=generator)
    return b / rank**0.5, torch.randn(rank, shape[1], device=device, generator=generator)


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Median time of a call, device work included, after one call to warm up if repeated."""

    def once() -> float:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started

    if repeats > 1:
        once()
    return statistics.median(once() for _ in range(repeats))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock sees the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def published_factors(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The published way: SVD of the materialised product in fp32."""
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    root = s[: b.shape[1]].sqrt()
    return u[:, : b.shape[1]] * root, root[:, None] * vt[: b.shape[1]]


def errors(b: Tensor, a: Tensor, new_b: Tensor, new_a: Tensor) -> list[float]:
    """Relative change of the product and ||B'B - AA'|| / ||S||, measured in float64."""
    b, a, new_b, new_a = (x.double() for x in (b, a, new_b, new_a))
    change = torch.linalg.norm(new_b @ new_a - b @ a) / torch.linalg.norm(b @ a)
    gram_b, gram_a = new_b.mT @ new_b, new_a @ new_a.mT
    return [float(change), float(torch.linalg.norm(gram_b - gram_a) / torch.linalg.norm(gram_b))]


def single_matrices(models: list[str], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape of each model."""
    rows = []
    for model in models:
        rank = RANKS[model]
        for shape in sorted(set(target_shapes(model))):
            b, a = random_factors(shape, rank, device, 0)
            row: dict[str, Any] = {"model": model, "m": shape[0], "n": shape[1], "r": rank}
            row["published_ms"] = 1e3 * seconds_of(partial(published_factors, b, a), device)
            row["published_errors"] = errors(b, a, *published_factors(b, a))
            for name, function in (("ours", balanced_factors), ("qr", balanced_factors_by_qr)):
                work = partial(function, b, a)
                row[f"{name}_ms"] = 1e3 * seconds_of(work, device, repeats)
                result = function(b, a)
                row[f"{name}_errors"] = errors(b, a, result.b, result.a)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def whole_models(models: list[str], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """All matrices of a model in place, as one rank does it; and the eigenproblems alone."""
    rows = []
    for model in models:
        rank, shapes = RANKS[model], target_shapes(model)
        pairs = [random_factors(shape, rank, device, i) for i, shape in enumerate(shapes)]
        copies = [(b.clone(), a.clone()) for b, a in pairs]

        def restore(pairs: Any = pairs, copies: Any = copies) -> None:
            for pair, copy in zip(pairs, copies, strict=True):
                for target, source in zip(pair, copy, strict=True):
                    target.copy_(source)

        workspace = workspace_of(4 * rank * sum(m + n for m, n in shapes))
        times, extra = [], 0
        for _ in range(repeats + 1):
            restore()  # balanced factors would make the eigenproblems diagonal, hence easier
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            work = partial(balance_in_place, pairs, workspace_bytes=workspace)
            times.append(seconds_of(work, device))
            if device.type == "cuda":
                extra = torch.cuda.max_memory_allocated(device) - held
        row = {
            "model": model,
            "matrices": len(shapes),
            "r": rank,
            "seconds": statistics.median(times[1:]),
            "seconds_range": [min(times[1:]), max(times[1:])],
            "first_seconds": times[0],
            "workspace_mib": extra / 2**20,
            "eigh_ms": eigenproblems(rank, device, repeats),
        }
        del pairs, copies
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def eigenproblems(rank: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds a symmetric r x r eigenproblem in float64: one by one, batched, on 4 streams."""
    count = 8
    square = torch.randn(count, rank, rank, dtype=torch.float64, device=device)
    square = square @ square.mT

    def one_by_one() -> None:
        for matrix in square:
            torch.linalg.eigh(matrix)

    results = {
        "one_by_one": seconds_of(one_by_one, device, repeats),
        "batched": seconds_of(lambda: torch.linalg.eigh(square), device, repeats),
    }
    if device.type == "cuda":
        streams = [torch.cuda.Stream(device) for _ in range(4)]

        def lane(index: int) -> None:
            with torch.cuda.stream(streams[index]):
                for matrix in square[index::4]:
                    torch.linalg.eigh(matrix)

        with ThreadPoolExecutor(4) as pool:
            results["four_streams"] = seconds_of(
                lambda: list(pool.map(lane, range(4))), device, repeats
            )
    return {name: 1e3 * value / count for name, value in results.items()}


def run_config(model: str, arguments: argparse.Namespace, micro: int) -> RunConfig:
    """A low-rank run of the model; data are not opened."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": model},
            "method": {"name": "low_rank", "rank": RANKS[model], "alpha": 32.0},
            "optimizer": {"lr": 1e-3},
            "data": {"train": "unused", "sequence_length": SEQUENCE_LENGTH},
            "train": {
                "updates": 1000,
                "global_batch_size": arguments.batch,
                "micro_batch_size": micro,
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
                "compile": arguments.compile,
            },
            "restarts": {"every": 1},
        }
    )


def timed_restarts(
    restarts: Restarts, state: EngineState, pairs: list[FactorPair], repeats: int
) -> tuple[list[RestartReport], int, int]:
    """Reports of restarts after the first (which warms up), peak memory in them, the part of it
    that the restart itself takes (bytes)."""
    reports, peak, workspace = [], 0, 0
    cuda = state.device.type == "cuda"
    for number in range(repeats + 1):
        for parameter in factor_parameters(pairs):  # balanced factors would be easier
            if (master := state.master(parameter)) is not None:
                master.normal_(0.0, 0.05)
        state.refresh_weights()
        synchronize(state.device)
        dist.barrier()
        if cuda:
            torch.cuda.reset_peak_memory_stats(state.device)
            held = torch.cuda.memory_allocated(state.device)
        report = restarts.after_update(number + 1)
        if cuda:
            peak = max(peak, torch.cuda.max_memory_allocated(state.device))
            workspace = max(workspace, peak - held)
        if report is not None and number > 0:
            reports.append(report)
    return reports, peak, workspace


def in_engine(model: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Restarts and updates of a training run on all ranks."""
    world = dist.get_world_size()
    micro = min(MICRO_BATCH[model], arguments.batch // world)
    config = run_config(model, arguments, micro)
    user = {"zero_optimization": {"stage": arguments.stage}}
    ds_config = resolve_deepspeed_config(config, user, "benchmark", world)
    decoder = build_model(config, device)
    engine = build_engine(config, ds_config, decoder)
    pairs = decoder.factor_pairs()
    restarts = Restarts(config.restarts, engine, pairs, 1000, lambda t: 1.0)
    state = EngineState(engine)
    set_learning_rate(engine, 1e-4)
    tokens = torch.randint(0, 32000, (micro, SEQUENCE_LENGTH), device=device)

    def update() -> None:
        for _ in range(ds_config["gradient_accumulation_steps"]):
            engine.backward(engine(tokens, tokens) / tokens.numel())
            engine.step()

    update()  # compiles, creates the optimizer's state
    update_seconds = seconds_of(update, device, repeats=2)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    reports, restart_peak, workspace = timed_restarts(restarts, state, pairs, arguments.repeats)
    refactorize = [report.refactorize_seconds for report in reports]
    reset = [report.reset_seconds for report in reports]
    both = statistics.median(refactorize) + statistics.median(reset)
    engine.destroy()
    row = {
        "model": model,
        "ranks": world,
        "zero_stage": arguments.stage,
        "compiled": arguments.compile,
        "matrices": len(pairs),
        "by_qr": max(report.matrices_by_qr for report in reports),
        "refactorize_seconds": statistics.median(refactorize),
        "refactorize_seconds_range": [min(refactorize), max(refactorize)],
        "reset_seconds": statistics.median(reset),
        "update_seconds": update_seconds,
        "sequences_an_update": arguments.batch,
        "restart_share_percent": 100 * both / (arguments.period * update_seconds),
        "training_peak_gib": peak / 2**30,
        "restart_peak_gib": restart_peak / 2**30,
        "extra_peak_percent": 100 * max(0, restart_peak - peak) / max(1, peak),
        "restart_workspace_percent": 100 * workspace / max(1, peak),
    }
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [
        "# Refactorization",
        "",
        f"`{result['command']}` on {result['ranks']} x {result['device']}, "
        f"torch {result['versions']['torch']}, commit {result['commit']}.",
    ]
    if result["single"]:
        lines += [
            "",
            "One matrix, milliseconds (relative error of the product / of the balance):",
            "",
            "| m x n, r | SVD of BA (published) | megalr | its QR path |",
            "|---|---|---|---|",
        ]
    for row in result["single"]:
        cells = [f"{row['m']} x {row['n']}, {row['r']}"]
        for name in ("published", "ours", "qr"):
            change, balance = row[f"{name}_errors"]
            cells.append(f"{row[f'{name}_ms']:.2f} ({change:.1e} / {balance:.1e})")
        lines.append(f"| {' | '.join(cells)} |")
    if result["models"]:
        lines += [
            "",
            "All matrices of a model on one device, in place; one r x r eigenproblem in ms:",
            "",
            "| model | matrices | seconds | workspace MiB | one by one / batched / 4 streams |",
            "|---|---|---|---|---|",
        ]
    for row in result["models"]:
        eigh = " / ".join(f"{value:.2f}" for value in row["eigh_ms"].values())
        lines.append(
            f"| {row['model']} r{row['r']} | {row['matrices']} | {row['seconds']:.3f} "
            f"| {row['workspace_mib']:.0f} | {eigh} |"
        )
    lines += [
        "",
        f"Inside the engine, {result['ranks']} rank(s); share of the time of {result['period']} "
        "updates:",
        "",
        "| model | refactorize s | reset s | update s | share % | train peak GiB | extra peak % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["engine"]:
        lines.append(
            f"| {row['model']} | {row['refactorize_seconds']:.3f} | {row['reset_seconds']:.4f} "
            f"| {row['update_seconds']:.3f} | {row['restart_share_percent']:.3f} "
            f"| {row['training_peak_gib']:.1f} | {row['extra_peak_percent']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def commit() -> str:
    """The checked-out commit, "unknown" outside a repository."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    return git.stdout.strip()[:12] or "unknown"


def main() -> None:
    """Measure and write the results."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS)[1:])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--period", type=int, default=200, help="updates between restarts")
    parser.add_argument("--batch", type=int, default=512, help="sequences an update")
    parser.add_argument("--stage", type=int, default=1, choices=[1, 2, 3])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--commit", help="commit to note in the result, default: git's")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    device = start_distributed()
    alone = dist.get_world_size() == 1
    result: dict[str, Any] = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": arguments.commit or commit(),
        "period": arguments.period,
        "single": single_matrices(arguments.models, arguments.repeats, device) if alone else [],
        "models": whole_models(arguments.models, arguments.repeats, device) if alone else [],
        "engine": [],
    }
    for model in (m for m in arguments.models if m in MICRO_BATCH):
        result["engine"].append(in_engine(model, arguments, device))
        torch.cuda.empty_cache()
        if dist.get_rank() == 0:  # after every model: what is measured stays if the next one fails
            arguments.output.mkdir(parents=True, exist_ok=True)
            name = f"refactorization_{result['ranks']}"
            (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            (arguments.output / f"{name}.md").write_text(markdown(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_cleanly(main)
