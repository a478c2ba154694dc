"""What stands between the products: by torch and by kernels of megalr, on one GPU.

    python benchmarks/memory_bound.py --output results

Work, at the micro-batches of benchmarks/lab/performance.md: the residual sum with its RMSNorm,
forward and backward (torch: compiled); the gradient of the embedding for ids that are as often as
words are (the n-th in proportion to 1 / (n + 2)); the sum of two chunks' gradients of the head's
weight, and both gradients of the head times a factor. "ms" is device time, from CUDA graphs, "TB/s"
what that is at the bytes that must be moved, "error" the relative Frobenius error against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from head import SHAPES, VOCABULARY
from record import save_measured
from timing import attempt, cuda_device, milliseconds
from torch import Tensor

from megalr.errors import exit_cleanly
from megalr.kernels.embedding import summed_rows
from megalr.kernels.loss import REFERENCE_OPS, TRITON_OPS, GradientOps
from megalr.kernels.norm import add_norm

EPS = 1e-6
Work = Callable[[], tuple[Tensor, ...]]


def _of_torch(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + added
    return total, F.rms_norm(total, weight.shape, weight, eps)


def norm(tokens: int, width: int) -> tuple[dict[str, Work], int, tuple[Tensor, ...]]:
    """Sum and norm with their gradients: ways, bytes, exact gradients."""
    inputs = [torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_() for _ in "xa"]
    inputs.append((1 + 0.1 * torch.randn(width, device="cuda")).bfloat16().requires_grad_())
    upstream = [torch.randn(tokens, width, device="cuda").bfloat16() for _ in "ty"]

    def of(way: Callable[..., tuple[Tensor, ...]]) -> Work:
        return lambda: torch.autograd.grad(way(*inputs, EPS), inputs, upstream)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(_of_torch(*wide, EPS), wide, [t.double() for t in upstream])
    ways = {"torch": of(torch.compile(_of_torch, dynamic=False)), "megalr": of(add_norm)}
    return ways, 8 * tokens * width * 2, exact


def embedding(tokens: int, width: int) -> tuple[dict[str, Work], int, tuple[Tensor, ...]]:
    """The gradient of the table."""
    often = 1 / torch.arange(3, VOCABULARY + 3, device="cuda", dtype=torch.float64)
    ids = torch.multinomial(often, tokens, replacement=True)
    dy = torch.randn(tokens, width, device="cuda").bfloat16()
    exact = torch.zeros(VOCABULARY, width, device="cuda", dtype=torch.float64)
    exact.index_add_(0, ids, dy.double())
    backward = torch.ops.aten.embedding_dense_backward
    ways: dict[str, Work] = {
        "torch": lambda: (backward(dy, ids, VOCABULARY, -1, False),),
        "megalr": lambda: (summed_rows(ids, dy, VOCABULARY),),
    }
    return ways, (tokens + VOCABULARY) * width * 2, (exact,)


def head(tokens: int, width: int) -> tuple[dict[str, Work], int, tuple[Tensor, ...]]:
    """The sum of two chunks, and both gradients times a factor."""
    grad_x = torch.randn(tokens, width, device="cuda").bfloat16()
    chunks = [torch.randn(VOCABULARY, width, device="cuda").bfloat16() for _ in range(2)]
    factor = torch.tensor(1 / 3, device="cuda")

    def of(way: GradientOps) -> Work:
        def work() -> tuple[Tensor, ...]:
            grads = (grad_x, way.add(*chunks))
            return tuple(way.scale(x, factor, torch.bfloat16) for x in grads)

        return work

    ways = {"torch": of(REFERENCE_OPS), "megalr": of(TRITON_OPS)}
    return ways, VOCABULARY * width * (2 + 2 + 4 + 4 + 2) + 4 * tokens * width, ()


WORK = {"sum and norm": norm, "embedding": embedding, "head": head}


def measure(tokens: int, width: int) -> dict[str, dict]:
    """Every work both ways at one shape."""
    results: dict[str, dict] = {}
    for name, build in WORK.items():
        torch.manual_seed(0)
        ways, moved, exact = build(tokens, width)
        for way, work in ways.items():
            row: dict[str, float | str] = {"ms": attempt(lambda f=work: milliseconds(f))}
            if isinstance(row["ms"], float):
                row["TB/s"] = round(moved / row["ms"] / 1e9, 3)
            found = work() if exact else ()
            errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
            if errors:
                row["error"] = max(float(e) for e in errors)
            results[f"{name}, {way}"] = row
    return results


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of memory_bound.json; none else")
    arguments = parser.parse_args()
    device = cuda_device()
    results = {}
    for shape, sizes in SHAPES.items():
        results[shape] = measure(*sizes)
        for name, row in results[shape].items():
            print(f"{shape:5} {name:22} {row}", flush=True)
    save_measured("memory_bound", device, {"results": results}, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
