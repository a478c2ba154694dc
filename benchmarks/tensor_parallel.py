"""Blocks under tensor parallelism: dense, low-rank column_row, low-rank bottleneck.

    torchrun --nproc_per_node 2 benchmarks/tensor_parallel.py --shapes 1b 7b --output results

Forward and backward of ``--layers`` blocks of a preset's shape, compiled block by block, bf16,
r = h/4, without embedding, head and optimizer; all ranks form one tensor-parallel group. Reported:
the median and the range of tokens/s (also scaled to the preset's number of layers), peak GiB a GPU
(weights, gradients and all), GiB of activations kept from forward to backward, and the bytes that
a rank sends for a micro-batch, by the formula that the tests count (benchmarks.scaling.traffic).
Without GPUs it runs on the CPU, which only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist

from megalr.distributed.process_group import start_distributed
from megalr.errors import UserError, exit_cleanly
from megalr.estimate.traffic import block_messages
from megalr.models.build import build_decoder
from megalr.models.config import PRESETS, DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.rope import rope_tables
from megalr.tensor_parallel.mesh import make_mesh
from megalr.tensor_parallel.plan import Plan

SHAPES = {"tiny": "llama_20m", "350m": "llama_350m", "1b": "llama_1b", "7b": "llama_7b"}
KINDS = {
    "dense": ("full_rank", "column_row"),
    "column_row": ("low_rank", "column_row"),
    "bottleneck": ("low_rank", "bottleneck"),
}
TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


def build(config: DecoderConfig, kind: str, device: torch.device, compiled: bool) -> Decoder:
    """The blocks of a kind on this rank, bf16."""
    method = method_of(kind, config.hidden_size)
    plan = Plan(make_mesh(dist.get_world_size(), device.type), KINDS[kind][1])
    with device:
        decoder = build_decoder(config, method, seed=0, plan=plan).bfloat16()
    if compiled:
        for block in decoder.blocks():
            block.compile(dynamic=False)
    return decoder


def forward(decoder: Decoder, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """The blocks' output for ``x``."""
    added = torch.zeros_like(x)
    for block in decoder.blocks():
        x, added = block(x, rope, None, added)
    return x + added


def one_pass(decoder: Decoder, x: torch.Tensor, rope: torch.Tensor, gradient: torch.Tensor) -> None:
    """Forward and backward of the blocks on ``x (B, S, h)``, or this rank's part of it.

    ``gradient`` is random like x: products of equal numbers run faster than real ones.
    """
    forward(decoder, x, rope).backward(gradient)
    decoder.zero_grad(set_to_none=True)
    x.grad = None


def check_gradients(
    decoder: Decoder, x: torch.Tensor, rope: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Raise UserError if a weight gets no gradient: torch 2.11 has lost them, at higher speed."""
    forward(decoder, x, rope).backward(gradient)
    for name, parameter in decoder.named_parameters():
        if ".layers." in f".{name}" and (parameter.grad is None or not parameter.grad.any()):
            raise UserError(f"{name} has no gradient: the compiled blocks are not what they were")
    decoder.zero_grad(set_to_none=True)
    x.grad = None


def kept_bytes(decoder: Decoder, x: torch.Tensor, rope: torch.Tensor) -> int:
    """Bytes of activations that the blocks keep from forward to backward, on this GPU."""
    before = torch.cuda.memory_allocated()
    kept = forward(decoder, x, rope)  # what it keeps lives as long as it
    after = torch.cuda.memory_allocated()
    del kept
    return after - before


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """The work as one CUDA graph, its sums included."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills the libraries' workspaces
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    return graph.replay


def measure(
    config: DecoderConfig,
    kind: str,
    shape: tuple[int, int],
    repeats: int,
    device: torch.device,
    graphed: bool,
) -> dict[str, Any]:
    """Numbers of one kind of blocks for micro-batches of ``shape``."""
    decoder = build(config, kind, device, compiled=device.type == "cuda")
    ranks = dist.get_world_size()
    width = config.hidden_size // (ranks if decoder.plan.sharded_residual else 1)
    x = torch.randn(*shape, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)
    rope = rope_tables(shape[1], config.rotary_width, config.rope_theta, device)
    tokens = shape[0] * shape[1]
    rates = []
    check_gradients(decoder, x, rope, gradient)
    work = lambda: one_pass(decoder, x, rope, gradient)  # noqa: E731
    if graphed:
        work = captured(work)
    for number in range(repeats + 3):
        if number == 3 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _wait(device)
        dist.barrier()
        started = time.perf_counter()
        work()
        _wait(device)
        if number >= 3:
            rates.append(tokens / (time.perf_counter() - started))
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu and not graphed else None
    kept = kept_bytes(decoder, x, rope) / 2**30 if on_gpu else None
    return {
        "kind": kind,
        "tensor": ranks,
        "layers": config.num_layers,
        "tokens": tokens,
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "peak_memory_gib": peak and round(peak, 2),
        "activations_gib": kept and round(kept, 3),
        "bytes_sent": round(bytes_sent(decoder, kind, tokens)),
    }


def bytes_sent(decoder: Decoder, kind: str, tokens: int) -> float:
    """Bytes that a rank of a ring sends for a micro-batch, forward and backward of all blocks."""
    ranks = decoder.plan.mesh.tensor_size
    method = method_of(kind, decoder.config.hidden_size)
    messages = [m for way in block_messages(decoder.config, method, decoder.plan) for m in way]
    size = sum(m.size(tokens) * (2 if m.kind == "all_reduce" else 1) for m in messages)
    return decoder.config.num_layers * size * (ranks - 1) / ranks


def method_of(kind: str, hidden_size: int) -> SimpleNamespace:
    """The settings of a kind's method."""
    return SimpleNamespace(
        name=KINDS[kind][0], rank=hidden_size // 4, alpha=32.0, init="kaiming", targets=TARGETS
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure the chosen shapes and kinds on the ranks of this start; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 2048], help="sequences, length")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graph", action="store_true", help="as one CUDA graph; no peak is given")
    parser.add_argument(
        "--overlap", nargs="+", default=[], help="inductor's passes that move sums beside products"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    device = start_distributed()
    torch._inductor.config.reorder_for_compute_comm_overlap = bool(arguments.overlap)
    torch._inductor.config.reorder_for_compute_comm_overlap_passes = arguments.overlap
    ranks, results = dist.get_world_size(), []
    for shape in arguments.shapes:
        preset = PRESETS[SHAPES[shape]]
        config = replace(preset, num_layers=arguments.layers)
        for kind in arguments.kinds:
            if kind == "bottleneck" and ranks == 1:
                continue  # nothing is cut
            batch = arguments.batch[0], arguments.batch[1]
            found = measure(config, kind, batch, arguments.repeats, device, arguments.graph)
            whole = found["tokens_per_second"] * arguments.layers / preset.num_layers
            found = {"shape": shape, **found, "whole_model_tokens_per_second": round(whole)}
            results.append(found)
            if dist.get_rank() == 0:
                print(json.dumps(found), flush=True)
    if dist.get_rank() == 0:
        name = f"tensor_parallel_{ranks}" + "_graph" * arguments.graph
        record("_".join([name, *arguments.overlap]), arguments.output, results)
    dist.destroy_process_group()


def record(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    """Write the results with the command and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = {"command": " ".join(sys.argv[1:]), "torch": torch.__version__, "device": device}
    text = json.dumps({**where, "results": results}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    exit_cleanly(main)
