"""Time, memory and communication of an update on 8 to 4,096 GPUs, predicted, and how far to trust.

    python benchmarks/scaling_model.py --check                 predictions beside measurements
    python benchmarks/scaling_model.py --output docs           docs/scaling.md's tables, scaling.svg

Three numbers of the GPU are fitted to the recorded runs of one GPU in ``benchmarks/results``; what
was recorded on several GPUs is compared and not fitted. The cluster's links are options.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_points import (
    ALL_REDUCES,
    H200,
    METHODS,
    PROTOTYPE_MODEL,
    PROTOTYPE_TP,
    RESULTS,
    balancing,
    fit,
    loader,
    method_of,
    recorded,
    run_config,
)
from scaling_report import draw, tables, write_between

from megalr.config.schema import ParallelConfig
from megalr.errors import UserError, exit_cleanly
from megalr.estimate.besides import checkpoint_seconds, loading_seconds, refactorize_seconds
from megalr.estimate.cluster import Cluster, Members, all_reduce, members
from megalr.estimate.memory import GIB, estimate_memory
from megalr.estimate.steps import Gpu, Job, UpdateTime, message_seconds, predict
from megalr.estimate.tensors import TRAINED, count, plan_of, stored_tensors
from megalr.estimate.traffic import block_messages
from megalr.estimate.work import Work, block_work, micro_batch_work
from megalr.models.config import PRESETS
from megalr.parallel.plan import SINGLE

MODELS = ("llama_1b", "llama_7b", "llama_13b")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCE, SEQUENCES = 2048, 2048
"""Positions and sequences of a global batch of the predictions: 4.2 M tokens."""


def check() -> None:
    """Print predictions beside measurements."""
    runs = recorded()
    single = [run for run in runs if run.job.gpus == 1]
    gpu = fit(single)
    print(
        f"fitted: {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.overhead * 1000:.2f} ms an update\n"
    )
    print("| run | ms an update | predicted | error % | predicted without it in the fit, error % |")
    print("|---|---|---|---|---|")
    for run in runs:
        predicted = predict(run.job, gpu, H200).total
        others = [other for other in single if other is not run]
        left_out = predict(run.job, fit(others), H200).total
        print(
            f"| {run.name} | {run.seconds * 1000:.2f} | {predicted * 1000:.2f} | "
            f"{100 * (predicted / run.seconds - 1):+.1f} | "
            f"{100 * (left_out / run.seconds - 1):+.1f} |"
        )
    if len(single) == len(runs):
        print(
            "\nNo run of several GPUs is recorded yet: that part is not checked inside the engine."
        )
    _check_prototypes(gpu)
    _check_refactorization()
    _check_links()


def _check_prototypes(gpu: Gpu) -> None:
    print("\n| prototype, not fitted | tokens/s | predicted | error % |\n|---|---|---|---|")
    for (preset, name), rate in PROTOTYPE_MODEL.items():
        batch = 128 if preset == "llama_60m" else 64
        method = method_of(preset, name)
        forward, backward = micro_batch_work(PRESETS[preset], method, SINGLE, batch, 256)
        # Its fused AdamW reads and writes bf16 weights, gradients and moments.
        tensors = stored_tensors(PRESETS[preset], method)
        step = Work(moved=14 * count(tensors, PRESETS[preset].num_layers, *TRAINED))
        predicted = batch * 256 / gpu.seconds(forward + backward + step)
        _print_rate(f"{preset} {name}", rate, predicted)
    for (name, tensor, kind), rate in PROTOTYPE_TP.items():
        predicted = blocks_rate(gpu, "llama_7b", name, tensor, kind)
        _print_rate(f"7B blocks {name}, TP {tensor} {kind}", rate, predicted)
    _check_blocks(gpu)


def _check_blocks(gpu: Gpu) -> None:
    """Blocks of megalr's own, as benchmarks/tensor_parallel.py records them (8 x 2048 tokens)."""
    kinds = {"dense": ("full_rank", "column_row")}
    kinds |= {layout: ("low_rank", layout) for layout in ("column_row", "bottleneck")}
    for path in sorted(RESULTS.glob("tensor_parallel_*.json")):
        for row in json.loads(path.read_text())["results"]:
            (name, layout), preset = kinds[row["kind"]], f"llama_{row['shape']}"
            predicted = blocks_rate(gpu, preset, name, row["tensor"], layout)
            how = path.stem.removeprefix(f"tensor_parallel_{row['tensor']}").replace("_", " ")
            title = f"megalr's blocks, {row['shape']} {row['kind']}, TP {row['tensor']}{how}"
            _print_rate(title, row["whole_model_tokens_per_second"], predicted)


def _print_rate(name: str, rate: float, predicted: float) -> None:
    error = 100 * (predicted / rate - 1)
    print(f"| {name} | {rate:,} | {predicted:,.0f} | {error:+.1f} |")


def blocks_rate(gpu: Gpu, preset: str, name: str, tensor: int, layout: str) -> float:
    """Tokens/s of all blocks of a model, 8 x 2048 tokens; no embedding, head, optimizer."""
    sizes, method, tokens = PRESETS[preset], method_of(preset, name), 8 * 2048
    plan = plan_of(sizes, method, tensor, layout)
    forward, backward = block_work(sizes, method, plan, 8, 2048)
    seconds = gpu.seconds(forward + backward)
    group = members(H200, plan.mesh.tensor_size)
    for messages in block_messages(sizes, method, plan):
        seconds += sum(message_seconds(m, tokens, group, H200) for m in messages)
    return tokens / (sizes.num_layers * seconds)


def _check_refactorization() -> None:
    print("\n| refactorization in the engine | seconds | predicted | error % |\n|---|---|---|---|")
    for gpus in (1, 4):
        for row in json.loads((RESULTS / f"refactorization_{gpus}.json").read_text())["engine"]:
            preset = row["model"]
            job = Job(PRESETS[preset], method_of(preset, "low_rank"), 1, 256, data_size=gpus)
            predicted = refactorize_seconds(job, H200, balancing())
            seconds = row["refactorize_seconds"]
            error = 100 * (predicted / seconds - 1)
            print(f"| {preset}, {gpus} GPU | {seconds:.3f} | {predicted:.3f} | {error:+.0f} |")


def _check_links() -> None:
    print("\n| all-reduce on 4 GPUs, MB | ms | from the links | error % |\n|---|---|---|---|")
    for size, seconds in ALL_REDUCES:
        found = all_reduce(size, Members(4, 1), H200)
        error = 100 * (found / seconds - 1)
        print(f"| {size / 1e6:.0f} | {seconds * 1000:.2f} | {found * 1000:.2f} | {error:+.0f} |")


@dataclass(frozen=True)
class Choice:
    """The fastest way that fits, of one model and method on a number of GPUs."""

    preset: str
    method: str
    job: Job
    time: UpdateTime
    memory: float
    refactorize: float
    checkpoint: float
    loading: float

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.job.tokens / self.time.total / self.job.gpus


def candidates(preset: str, method: Any, gpus: int) -> Iterator[Job]:
    """Ways to run the global batch on ``gpus`` GPUs."""
    sizes = PRESETS[preset]
    layouts = ("column_row", "bottleneck") if method.name == "low_rank" else ("column_row",)
    cut = [plan_of(sizes, method, t, layout) for t in (2, 4, 8) for layout in layouts]
    for plan in (SINGLE, *cut):
        data_size = gpus // plan.mesh.tensor_size
        if data_size < 1 or SEQUENCES % data_size:
            continue
        share = SEQUENCES // data_size
        for micro in (m for m in (1, 2, 4, 8, 16, 32) if share % m == 0):
            for stage in (1, 2):
                for recompute in (False, True):
                    yield Job(
                        sizes,
                        method,
                        micro,
                        SEQUENCE,
                        share // micro,
                        plan,
                        data_size,
                        stage,
                        recompute,
                        clipping=True,
                    )


def peak_of(preset: str, job: Job) -> float:
    """Bytes of a GPU."""
    method = job.method.model_dump()
    how = "full" if job.recompute else "none"
    config = run_config(
        preset, method, job.micro_batch, SEQUENCES, SEQUENCE, activation_checkpointing=how
    )
    parallel = {"tensor": job.plan.mesh.tensor_size, "layout": job.plan.layout}
    config = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
    user = {"zero_optimization": {"stage": job.stage}}
    return estimate_memory(config, user, "scaling model", job.gpus).peak


def choose(preset: str, name: str, gpus: int, gpu: Gpu, cluster: Cluster) -> Choice:
    """The fastest candidate whose memory fits.

    Raises:
        UserError: none fits.
    """
    method = method_of(preset, name)
    jobs = sorted(
        ((predict(job, gpu, cluster), job) for job in candidates(preset, method, gpus)),
        key=lambda pair: pair[0].total,
    )
    for time, job in jobs:
        if (memory := peak_of(preset, job)) <= cluster.memory:
            return Choice(
                preset,
                name,
                job,
                time,
                memory,
                refactorize_seconds(job, cluster, balancing()),
                checkpoint_seconds(job, cluster),
                loading_seconds(job, loader()),
            )
    raise UserError(f"{preset} {name} does not fit {gpus} GPUs of {cluster.memory / GIB:.0f} GiB")


def sweep(gpu: Gpu, cluster: Cluster) -> list[Choice]:
    """The best way of every model and method on every number of GPUs."""
    return [
        choose(preset, name, gpus, gpu, cluster)
        for preset in MODELS
        for name in METHODS
        for gpus in GPUS
    ]


def main() -> None:
    """Check, or predict and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--check", action="store_true", help="compare with what is recorded, and stop")
    add("--across", type=float, default=H200.across / 1e9, help="GB/s of a GPU between nodes")
    add("--inside", type=float, default=H200.inside / 1e9, help="GB/s of a GPU inside a node")
    add("--memory", type=float, default=H200.memory / GIB, help="GiB of a GPU")
    add("--output", type=Path, help="folder with scaling.md, whose tables are replaced")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    if arguments.check:
        check()
        return
    cluster = replace(
        H200,
        across=arguments.across * 1e9,
        inside=arguments.inside * 1e9,
        memory=arguments.memory * GIB,
    )
    choices = sweep(fit([run for run in recorded() if run.job.gpus == 1]), cluster)
    text = tables(choices)
    print(text)
    if arguments.output is not None:
        write_between(arguments.output / "scaling.md", text)
        draw(choices, arguments.output / "scaling.svg")


if __name__ == "__main__":
    exit_cleanly(main)
