"""The head and its loss, forward and backward, in the ways there are to compute them, on one GPU.

    python benchmarks/head.py --output results

Milliseconds (without CUDA graphs, since Liger waits for the device), the memory that a call needs
beyond its operands, and the error of the gradients against float64 on the first tokens. Ways:
megalr with its loss kernel, megalr with the compiled plain loss, Liger's fused linear cross entropy
(if liger-kernel is installed; with sums of dW in bf16, its default, and in float32, as megalr has
them), and plain compiled PyTorch with all logits.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import save_measured
from timing import attempt, cuda_device, milliseconds_eager, peak_mib
from torch import Tensor

from megalr.errors import exit_cleanly
from megalr.layers.head import Head

SHAPES = {"60m": (32768, 512), "350m": (16384, 1024), "1b": (16384, 2048)}
"""Tokens and hidden size at the micro-batches of benchmarks/lab/performance.md."""

VOCABULARY = 32000
CHECKED_TOKENS = 512
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_megalr(hidden: int, device: str, fused: bool) -> Loss:
    """The summed loss of ``(x, W, labels)`` as the decoder computes it."""
    with torch.device("meta"):
        head = Head(VOCABULARY, VOCABULARY, hidden)
    head.to_empty(device=device).bfloat16()
    if fused:
        head.fuse_loss()
    else:
        head.compile_loss()

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        head.weight = weight  # type: ignore[assignment]
        return head(x, labels)

    return loss


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, float32 where the compiler wants them."""
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


def of_liger(accumulate: torch.dtype | None) -> Loss:
    """Liger's loss of ``(x, W, labels)``."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=accumulate)
    return lambda x, weight, labels: module(weight, x, labels)


def ways(hidden: int, device: str) -> dict[str, Loss]:
    """Every way by its row of the table."""
    found: dict[str, Loss] = {
        "megalr, its kernel": of_megalr(hidden, device, fused=True),
        "megalr, compiled loss": of_megalr(hidden, device, fused=False),
        "all logits, compiled": torch.compile(plain, dynamic=False),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger, dW in bf16"] = of_liger(None)
        found["liger, dW in float32"] = of_liger(torch.float32)
    return found


def gradients(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and W."""
    return torch.autograd.grad(loss(x, weight, labels), (x, weight))


def errors(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> dict[str, float]:
    """Relative Frobenius errors of both gradients for a few tokens."""
    x = x.detach()[:CHECKED_TOKENS].requires_grad_()
    labels = labels[:CHECKED_TOKENS]
    found = gradients(loss, x, weight, labels)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = F.linear(exact_x, exact_w)
    exact = torch.autograd.grad(
        F.cross_entropy(logits, labels, reduction="sum"), (exact_x, exact_w)
    )
    names = ("error dx", "error dW")
    return {
        name: float((got.double() - want).norm() / want.norm())
        for name, got, want in zip(names, found, exact, strict=True)
    }


def measure(tokens: int, hidden: int, device: str) -> dict[str, dict[str, float | str]]:
    """Every way at one shape."""
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_()
    weight = torch.nn.Parameter((torch.randn(VOCABULARY, hidden, device=device) * 0.02).bfloat16())
    labels = torch.randint(0, VOCABULARY, (tokens,), device=device)
    rows: dict[str, dict[str, float | str]] = {}
    for name, loss in ways(hidden, device).items():
        work = lambda f=loss: gradients(f, x, weight, labels)  # noqa: E731
        rows[name] = {"ms": attempt(lambda w=work: milliseconds_eager(w))}
        rows[name]["MiB"] = attempt(lambda w=work: peak_mib(w))
        rows[name] |= errors(loss, x, weight, labels)
    return rows


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of head.json; none is written else")
    arguments = parser.parse_args()
    device = cuda_device()
    results = {name: measure(*shape, "cuda") for name, shape in SHAPES.items()}
    print(f"{device}, torch {torch.__version__}")
    for shape, rows in results.items():
        for way, row in rows.items():
            cells = "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
            print(f"{shape:6} {way:24} {cells}", flush=True)
    save_measured("head", device, {"results": results}, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
