"""AdamW of bf16 weights, gradients and moments: torch's fused step and megalr's, on one GPU.

    python benchmarks/adamw.py --output results

The tensors are those of low-rank decoders; gradients stay where they are. "ms" is device time, from
CUDA graphs, of a step as training makes it (clipped and left out inside the kernel), "TB/s" what
that is at the 14 bytes a parameter that must be moved, "ms, no clipping" without either, and "ms,
launched" with the host's launches, where these take longer. After three steps from the same
numbers: the share of weights that are not bitwise the same, and the largest difference of one (they
are of the order of 0.02, where bf16 numbers lie about 1e-4 apart).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from optimizers import RANKS
from record import save_measured
from timing import attempt, cuda_device, milliseconds, milliseconds_eager
from torch import Tensor

from megalr.errors import exit_cleanly
from megalr.kernels.adamw import AdamW
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config

BYTES = 14
"""A parameter: weight and both moments read and written, the gradient read, bf16 each."""

MODELS = ("llama_60m", "llama_350m", "llama_1b")
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
Make = Callable[[list[Tensor]], torch.optim.AdamW]

# capturable: torch refuses to be captured in a graph without; its fused step is the same.
WAYS: dict[str, Make] = {
    "torch, fused": lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True, capturable=True),
    "megalr": lambda p: AdamW(p, **OPTIONS, capturable=True),
}


def shapes(model: str) -> list[torch.Size]:
    """Of all parameters of the low-rank model."""
    method = SimpleNamespace(
        name="low_rank", rank=RANKS[model], alpha=32.0, init="kaiming", targets=TARGETS
    )
    with torch.device("meta"):
        decoder = build_decoder(decoder_config(model, {}), method, seed=0, initialize=False)
    return [p.shape for p in decoder.parameters()]


def built(make: Make, sizes: list[torch.Size], device: str) -> torch.optim.AdamW:
    """The optimizer over weights and gradients from a seed, with training's numbers for a step."""
    torch.manual_seed(0)
    parameters = []
    for size in sizes:
        p = torch.nn.Parameter((0.02 * torch.randn(size, device=device)).bfloat16())
        p.grad = (1e-3 * torch.randn(size, device=device)).bfloat16()
        parameters.append(p)
    optimizer = make(parameters)
    optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.ones((), device=device)  # type: ignore[attr-defined]
    return optimizer


def measure(make: Make, sizes: list[torch.Size], device: str) -> tuple[dict, list[Tensor]]:
    """Times of a way, and the weights after its first three steps."""
    optimizer = built(make, sizes, device)
    for _ in range(3):
        optimizer.step()
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    row = {"ms": attempt(lambda: milliseconds(optimizer.step))}
    if isinstance(row["ms"], float):
        row["TB/s"] = round(BYTES * sum(s.numel() for s in sizes) / row["ms"] / 1e9, 3)
    row["ms, launched"] = attempt(lambda: milliseconds_eager(optimizer.step))
    optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]
    row["ms, no clipping"] = attempt(lambda: milliseconds(optimizer.step))
    return row, weights


def compared(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """How far the weights of both ways are apart."""
    pairs = list(zip(found, expected, strict=True))
    unequal = sum(int((a != b).sum()) for a, b in pairs)
    return {
        "largest difference": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
        "share that differs": unequal / sum(b.numel() for _, b in pairs),
    }


def main() -> None:
    """Measure every model both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=RANKS, default=MODELS)
    parser.add_argument("--output", type=Path, help="folder of adamw.json; none is written else")
    arguments = parser.parse_args()
    device = cuda_device()
    results: dict[str, dict] = {}
    for model in arguments.models:
        sizes = shapes(model)
        rows = {way: measure(make, sizes, "cuda") for way, make in WAYS.items()}
        (theirs, expected), (ours, found) = rows.values()
        parameters = sum(size.numel() for size in sizes)
        ours |= compared(found, expected)
        result = {"parameters": parameters, "tensors": len(sizes)}
        results[model] = result | dict(zip(WAYS, (theirs, ours), strict=True))
        print(model, results[model], flush=True)
    save_measured("adamw", device, {"results": results}, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
