"""Where the time of SLTrain's product ``y = x (scale B A + S)^T`` goes, on one GPU.

    python benchmarks/sltrain.py --output results

Milliseconds of the operator, of its parts and of the ways to add and read the entries of S, for the
groups of matrices of a 1B layer: bf16, r 512, density 0.03, 16,384 tokens. Beside them a dense
layer of the same shapes, and the same algebra left to autograd, which keeps W. Each is the median
over replays of a CUDA graph, as in training, so that the time of the host does not count. Then the
peak memory of forward and backward. A measurement that fails says so below the table, and the
others go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from record import save_measured
from timing import attempt, cuda_device, milliseconds, peak_mib
from torch import Tensor

from megalr.errors import exit_cleanly
from megalr.layers.sparse_product import dense_stack, factor_gradients, sparse_low_rank

GROUPS = {
    "q,k,v": ((2048, 2048, 2048), 2048),
    "o": ((2048,), 2048),
    "gate,up": ((5504, 5504), 2048),
    "down": ((2048,), 5504),
}
"""The m_i and n of the matrices that share an input in a 1B LLaMA layer."""

TOKENS, RANK, DENSITY, SCALE = 16384, 512, 0.03, 8 / 512


@dataclass
class Operands:
    """What the product of one group reads and returns."""

    x: Tensor
    b: Tensor
    a: Tensor
    values: Tensor
    support: Tensor
    w: Tensor
    dy: Tensor
    sizes: tuple[int, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return self.x, self.b, self.a, self.values


def operands(sizes: tuple[int, ...], columns: int, device: str) -> Operands:
    """Random bf16 tensors of a group."""
    torch.manual_seed(0)
    rows, groups = sum(sizes), len(sizes)
    count = int(DENSITY * rows * columns)
    shapes = ((TOKENS, columns), (rows, RANK), (groups * RANK, columns), (count,))
    drawn = (torch.randn(shape, device=device) * 0.1 for shape in shapes)
    leaves = [tensor.bfloat16().requires_grad_() for tensor in drawn]
    support = torch.randperm(rows * columns, device=device)[:count].sort().values.int()
    w = torch.randn(rows, columns, device=device).bfloat16()
    dy = torch.randn(TOKENS, rows, device=device).bfloat16()
    return Operands(*leaves, support, w, dy, sizes)


def by_autograd(o: Operands) -> Tensor:
    """The same product without the operator."""
    parts = zip(o.b.split(o.sizes), (o.a * SCALE).split(RANK), strict=True)
    w = torch.cat([b_i @ a_i for b_i, a_i in parts]).view(-1).index_add(0, o.support, o.values)
    return o.x @ w.view(o.w.shape).t()


def by_operator(o: Operands) -> Tensor:
    """The operator that the layer calls."""
    return sparse_low_rank(*o.leaves, o.support, o.sizes, SCALE)


def dense_layer(o: Operands) -> Tensor:
    """A full-rank layer, W given."""
    return o.x @ o.w.t()


def with_backward(forward: Callable[[Operands], Tensor], o: Operands) -> tuple[Tensor, ...]:
    """Gradients of everything that the operator differentiates."""
    return torch.autograd.grad(forward(o), o.leaves, o.dy)


def dense_with_backward(o: Operands) -> tuple[Tensor, ...]:
    """The three products of a dense layer."""
    with torch.no_grad():
        return dense_layer(o), o.dy @ o.w, o.dy.t() @ o.x


def works(o: Operands) -> dict[str, Callable[[], object]]:
    """What is timed, by its row of the table."""
    leaves = Operands(*(t.detach() for t in o.leaves), o.support, o.w, o.dy, o.sizes)
    x, b, a, values = leaves.leaves
    empty, flat = values[:0], o.w.view(-1)

    def index_put() -> None:
        flat[o.support] += values

    return {
        "dense layer, forward + backward": lambda: dense_with_backward(o),
        "autograd, forward + backward": lambda: with_backward(by_autograd, o),
        "operator, forward + backward": lambda: with_backward(by_operator, o),
        "operator, forward": lambda: by_operator(leaves),
        "BA": lambda: dense_stack(b, a, empty, o.support[:0], o.sizes, SCALE),
        "add S: index_add_": lambda: flat.index_add_(0, o.support, values),
        "add S: index_put": index_put,
        "y = x W'": lambda: x @ o.w.t(),
        "dx = dy W": lambda: o.dy @ o.w,
        "D = dy' x": lambda: o.dy.t() @ x,
        "dB = D A', dA = B' D": lambda: factor_gradients(o.w, b, a, o.sizes, SCALE),
        "read S: index_select": lambda: flat.index_select(0, o.support),
    }


def measure_group(o: Operands) -> dict[str, float | str]:
    """All rows of one column of the table."""
    rows = {
        f"{name}, MiB at most": attempt(lambda f=f: peak_mib(lambda: with_backward(f, o)))
        for name, f in (("autograd", by_autograd), ("operator", by_operator))
    }
    times = {name: attempt(lambda w=work: milliseconds(w)) for name, work in works(o).items()}
    return {**times, **rows}


def table(results: dict[str, dict[str, float | str]]) -> str:
    """Rows by work, columns by group; ms unless the row says otherwise."""
    lines = [f"{'ms':38}" + "".join(f"{group:>12}" for group in results)]
    failures = []
    for row in next(iter(results.values())):
        cells = []
        for group, column in results.items():
            value = column[row]
            cells.append(f"{value:>12.3f}" if isinstance(value, float) else f"{'failed':>12}")
            if isinstance(value, str):
                failures.append(f"{row}, {group}: {value}")
        lines.append(f"{row:38}" + "".join(cells))
    return "\n".join([*lines, *failures])


def main() -> None:
    """Measure every group and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of sltrain.json; none is written else")
    arguments = parser.parse_args()
    device = cuda_device()
    results = {}
    for group, (sizes, columns) in GROUPS.items():
        results[group] = measure_group(operands(sizes, columns, "cuda"))
    print(f"{device}, torch {torch.__version__}\n{table(results)}", flush=True)
    save_measured("sltrain", device, {"milliseconds": results}, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
