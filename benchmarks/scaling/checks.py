"""Predictions of the scaling model beside recorded runs, prototypes and links, as tables."""

from __future__ import annotations

import json

from megalr.estimate.cluster import H200, Members, all_reduce_seconds, members
from megalr.estimate.tensors import TRAINED, count, plan_of, stored_tensors
from megalr.estimate.traffic import block_messages
from megalr.estimate.update_time import Gpu, Job, message_seconds, predict
from megalr.estimate.work import Work, block_work, micro_batch_work
from megalr.models.config import PRESETS
from megalr.tensor_parallel.plan import SINGLE
from scaling.besides import refactorize_seconds
from scaling.points import (
    ALL_REDUCES,
    PROTOTYPE_MODEL,
    PROTOTYPE_TP,
    RESULTS,
    balancing,
    fit,
    method_of,
    recorded,
)


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
        found = all_reduce_seconds(size, Members(4, 1), H200)
        error = 100 * (found / seconds - 1)
        print(f"| {size / 1e6:.0f} | {seconds * 1000:.2f} | {found * 1000:.2f} | {error:+.0f} |")
