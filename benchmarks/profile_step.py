"""Where the time of an update goes: wall clock, GPU kernels by name, host functions; and memory.

    python benchmarks/profile_step.py --cases 60m_low_rank_paper 1b_sltrain --output results

A case is one of benchmarks/cases.py, run in this process on random tokens by the engine, the
updater and the CUDA graph of a real run; there is no launcher, loader or log. For each case
``profile_CASE.txt`` gives the milliseconds of an update, what the allocator has reserved and does
not use, for each of its pools, the functions of the host (cProfile) and the kernels of the GPU
(torch profiler) with the most time of their own. ``--history`` adds what lives in segments that
are mostly free, and where it was allocated; recording that slows the host.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import CASES, Case, at_length, stage_of
from throughput import run_settings
from torch.profiler import ProfilerActivity, profile

from megalr.config.loading import load_run_config
from megalr.data.loader import UpdateBatch
from megalr.distributed.process_group import start_distributed
from megalr.engine.build import build_engine
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import exit_cleanly
from megalr.estimate.memory import GIB
from megalr.models.build import build_model
from megalr.training.step import train_step

ROOT = Path(__file__).resolve().parent.parent
UNUSED_MIB, LISTED_BLOCKS = 64, 4
OURS = r"[/\\](megalr|deepspeed)[/\\]"
"""File names of functions that are named."""


def updater_of(case: Case, folder: Path, device: torch.device) -> Callable[[], None]:
    """A function that makes one update of the case on the same random tokens."""
    path = folder / "run.yaml"
    settings = run_settings(case, folder, folder, gpus=1, updates=1000)
    path.write_text(yaml.safe_dump(settings))
    config = load_run_config([path], [])
    ds_user = {"zero_optimization": {"stage": stage_of(case)}}
    ds_config = resolve_deepspeed_config(config, ds_user, "profile", 1)
    engine = build_engine(config, ds_config, build_model(config, device))
    ids = torch.randint(3, 32000, (case.micro_batch, case.sequence + 1))
    # Contiguous as the loader's: a view would be copied to memory that the host waits for.
    inputs, labels = ids[:, :-1].contiguous().pin_memory(), ids[:, 1:].contiguous().pin_memory()
    batch = UpdateBatch(0, [(inputs, labels)], labels.numel(), (case.micro_batch,))
    number = iter(range(1, 1000))
    return lambda: train_step(engine, batch, next(number), 1e-4) and None


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Wall clock of one call, the device's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats * 1e3


def host_table(work: Callable[[], None], repeats: int) -> str:
    """Functions by the time spent in themselves."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(30)
    return text.getvalue()


def kernel_table(work: Callable[[], None], repeats: int, trace: Path | None) -> str:
    """GPU kernels by time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    averages = profiler.key_averages()
    return averages.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=110)


def memory_table(snapshot: list[dict[str, Any]]) -> str:
    """Reserved, used and unused GiB of each memory pool, and the largest unused pieces.

    A CUDA graph has a pool of its own; nothing else is put where it has left room.

    Args:
        snapshot: of ``torch.cuda.memory_snapshot``.
    """
    pools: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for segment in snapshot:
        pools.setdefault(tuple(segment["segment_pool_id"]), []).append(segment)
    lines = []
    for pool, segments in sorted(pools.items()):
        blocks = [block for segment in segments for block in segment["blocks"]]
        unused = sorted((b["size"] for b in blocks if b["state"] == "inactive"), reverse=True)
        reserved = sum(segment["total_size"] for segment in segments)
        pieces = ", ".join(f"{size / 2**20:.0f}" for size in unused[:12])
        lines.append(
            f"pool {pool}: {reserved / GIB:.3f} GiB reserved in {len(segments)} segments, "
            f"{(reserved - sum(unused)) / GIB:.3f} used, {sum(unused) / GIB:.3f} unused in "
            f"{len(unused)} pieces, the largest of MiB {pieces}"
        )
    return "\n".join(lines)


def half_empty_table(snapshot: list[dict[str, Any]]) -> str:
    """What keeps segments with ``UNUSED_MIB`` or more of unused memory from being given back.

    Of the memory outside of CUDA graphs. A line for each segment, and one for each of the largest
    blocks in use, with the two innermost of our or DeepSpeed's functions that allocated it.

    Args:
        snapshot: of ``torch.cuda.memory_snapshot``, with the history of allocations.
    """
    lines = []
    for segment in snapshot:
        used = [block for block in segment["blocks"] if block["state"] != "inactive"]
        unused = segment["total_size"] - sum(block["size"] for block in used)
        if tuple(segment["segment_pool_id"]) != (0, 0) or unused < UNUSED_MIB * 2**20:
            continue
        total = segment["total_size"] / 2**20
        lines.append(f"segment of {total:.0f} MiB, {unused / 2**20:.0f} unused, in use:")
        for block in sorted(used, key=lambda b: -b["size"])[:LISTED_BLOCKS]:
            frames = [f for f in block.get("frames", []) if re.search(OURS, f["filename"])]
            places = [f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames[:2]]
            lines.append(f"  {block['size'] / 2**20:.2f} MiB, {' < '.join(places) or 'unknown'}")
    return "\n".join(lines)


def profile_case(name: str, output: Path, trace: bool, history: bool, sequence: int) -> None:
    """Measure one case in this process and write its tables."""
    device = start_distributed()
    if history:
        torch.cuda.memory._record_memory_history("state", context="alloc", stacks="python")
    case = at_length(CASES[name], sequence)
    name += f"_{sequence}" if sequence != CASES[name].sequence else ""
    with tempfile.TemporaryDirectory() as folder:
        update = updater_of(case, Path(folder), device)
        for _ in range(5):
            update()
        lines = [f"case {name}, torch {torch.__version__}, {torch.cuda.get_device_name()}"]
        lines.append(f"update: {milliseconds(update, 30):.3f} ms")
        snapshot = torch.cuda.memory_snapshot()
        lines += [memory_table(snapshot), *([half_empty_table(snapshot)] if history else [])]
        lines.append(host_table(update, 20))
        lines.append(kernel_table(update, 2, output / f"trace_{name}.json.gz" if trace else None))
    (output / f"profile_{name}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:3]), flush=True)


def main() -> None:
    """Profile every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, required=True)
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace as well")
    parser.add_argument("--history", action="store_true", help="name what half-empty segments hold")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if len(arguments.cases) == 1:
        flags = arguments.trace, arguments.history
        profile_case(arguments.cases[0], arguments.output, *flags, arguments.sequence)
        return
    for name in arguments.cases:
        words = ["--cases", name, "--output", str(arguments.output)]
        words += ["--sequence", str(arguments.sequence)]
        words += ["--trace"] if arguments.trace else []
        words += ["--history"] if arguments.history else []
        subprocess.run([sys.executable, __file__, *words], cwd=ROOT, check=False)


if __name__ == "__main__":
    exit_cleanly(main)
