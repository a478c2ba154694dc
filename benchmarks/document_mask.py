"""Forward and backward pass with document masks and without, at several lengths, on one GPU.

    python benchmarks/document_mask.py --model 60m --output results
    python benchmarks/document_mask.py --model 1b --lengths 2048 8192 --output results

Each length has one decoder, compiled, in bf16, as ``paper_bf16`` computes, with a CUDA graph for
each way, replayed in turn on the same windows. Reported: median milliseconds of a micro-batch and
range, the cost of masks, positions that a position sees, peak memory of the capture, and the loss
of the masks' way beside plain attention in float32.

Documents are drawn, not read: lengths are lognormal with median 230 and sigma 1.2, which gives the
mean near 480 tokens and the heavy tail of C4 with T5's tokenizer; ids are uniform. Windows are cut
from the stream of documents as data.packing does.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cases import LOW_1B, LOW_60
from record import save_measured
from timing import cuda_device

from megalr.engine.build import compile_blocks
from megalr.engine.cuda_graph import MicroBatchGraph
from megalr.errors import exit_cleanly
from megalr.kernels.attention import attention_applies
from megalr.kernels.document_mask import document_bounds, flex_applies
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.models.decoder import Decoder

MODELS = {"60m": ("llama_60m", LOW_60, 32768), "1b": ("llama_1b", LOW_1B, 16384)}
"""Preset, method and tokens of a micro-batch, as in benchmarks/cases.py."""

TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]
MEDIAN, SIGMA = 230, 1.2
BATCHES = 8
ROUNDS = 5
"""Rounds of all batches, each way in turn."""

SECONDS_A_ROUND = 0.4


def batches(rows: int, length: int, vocab_size: int) -> list[list[torch.Tensor]]:
    """BATCHES of ids, labels and positions, ``(rows, length)`` each, on the GPU."""
    random = np.random.default_rng(0)
    total = BATCHES * rows * length
    lengths = np.exp(random.normal(np.log(MEDIAN), SIGMA, total // 100)).astype(np.int64) + 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < total]
    assert len(starts) <= len(lengths), "the documents fill all windows"
    begins = np.zeros(total, np.int64)
    begins[starts] = starts
    place = np.arange(total)
    window = place // length * length
    positions = place - np.maximum(np.maximum.accumulate(begins), window)
    ids = random.integers(3, vocab_size, total + 1)
    labels = np.where(np.append(positions[1:], 0) == 0, -100, ids[1:])
    arrays = (ids[:-1], labels, positions.astype(np.int32))
    split = [torch.from_numpy(a).cuda().view(BATCHES, rows, length) for a in arrays]
    return [list(tensors) for tensors in zip(*split, strict=True)]


def form_of(decoder: Decoder, batch: list[torch.Tensor]) -> str:
    """Which attention the masks run in."""
    x = batch[0].new_empty((*batch[0].shape, 1), dtype=torch.bfloat16)
    if attention_applies(x, document_bounds(batch[2]), decoder.config.head_width):
        return "kernel"
    return "FlexAttention" if flex_applies(x, decoder.config.head_width) else "reference"


def captured(decoder: Decoder, shape: tuple[int, int], masks: bool) -> tuple[Any, float]:
    """The graph of a micro-batch, and GiB that its capture needs at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = MicroBatchGraph(decoder, shape, share_gradients=True, document_mask=masks)
    return graph, round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def replay_milliseconds(graph: MicroBatchGraph, inputs: list[list[torch.Tensor]]) -> float:
    """Mean time of a replay over all batches, repeated for SECONDS_A_ROUND."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    done, spent = 0, 0.0
    while spent < SECONDS_A_ROUND * 1e3:
        start.record()
        for batch in inputs:
            graph(batch, 1e-4)
        end.record()
        end.synchronize()
        spent, done = spent + start.elapsed_time(end), done + len(inputs)
    return spent / done


def measure(model: str, length: int) -> dict[str, Any]:
    """Both ways at one length."""
    preset, method, tokens = MODELS[model]
    rows = tokens // length
    settings = SimpleNamespace(**{"init": "kaiming", "targets": TARGETS, **method})
    with torch.device("cuda"):
        decoder = build_decoder(decoder_config(preset, {}), settings, seed=0)
    exact = sum_of_losses(decoder, batches(1, length, decoder.config.vocab_size)[0])
    decoder.bfloat16().use_kernels()
    found = sum_of_losses(decoder, batches(1, length, decoder.config.vocab_size)[0])
    compile_blocks(decoder)
    inputs = batches(rows, length, decoder.config.vocab_size)
    graphs, memory = {}, {}
    for way, masks in (("without", False), ("with", True)):
        graphs[way], memory[way] = captured(decoder, (rows, length), masks)
    times: dict[str, list[float]] = {way: [] for way in graphs}
    for _ in range(ROUNDS):
        for way, graph in graphs.items():
            used = [batch[: len(graph.inputs)] for batch in inputs]
            times[way].append(replay_milliseconds(graph, used))
    medians = {way: statistics.median(values) for way, values in times.items()}
    positions = torch.stack([batch[2] for batch in inputs])
    return {
        "model": model,
        "length": length,
        "rows": rows,
        "attention": form_of(decoder, inputs[0]),
        "visible": round(float((positions + 1.0).mean()), 1),
        "documents_per_row": round(float((positions == 0).sum()) / (BATCHES * rows), 2),
        "milliseconds": {way: round(value, 3) for way, value in medians.items()},
        "range": {way: [round(min(t), 3), round(max(t), 3)] for way, t in times.items()},
        "cost_percent": round(100 * (medians["with"] / medians["without"] - 1), 2),
        "peak_gib": memory,
        "loss_float32_and_bf16": [round(exact, 2), round(found, 2)],
    }


@torch.no_grad()
def sum_of_losses(decoder: Decoder, batch: list[torch.Tensor]) -> float:
    """The loss of one batch with masks."""
    return float(decoder(*batch))


def main() -> None:
    """Measure the chosen lengths of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--output", type=Path, help="folder of document_mask_MODEL.json")
    arguments = parser.parse_args()
    device = cuda_device()
    # As the engine does: a graph cannot be captured on the default stream.
    torch.cuda.set_stream(torch.cuda.Stream())
    rows = []
    for length in arguments.lengths:
        rows.append(measure(arguments.model, length))
        print(rows[-1], flush=True)
        name = f"document_mask_{arguments.model}"
        save_measured(name, device, {"rows": rows}, arguments.output)
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    exit_cleanly(main)
