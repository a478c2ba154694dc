"""Whether fp8 products pay for the factors: time and error of one layer's products, on one GPU.

    python benchmarks/fp8.py --output results

The products of a low-rank 1B layer (r 512, 16,384 tokens), forward and backward, in bf16 and in
fp8 (e4m3 activations and weights, e5m2 gradients, one scale a tensor from its largest entry, found
in the same step). fp8 products want both operands contiguous along the summed index, so what takes
part in two products is converted in both orders. Times are those of CUDA graphs: of the products
alone, and with the conversions, compiled. Errors are against float64 on the same bf16 numbers,
Gaussian ones, which is kind to a single scale: activations with outliers lose more. On a CPU
(``--tokens 256``) only the errors are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from record import save_measured
from sltrain import GROUPS, RANK
from timing import milliseconds
from torch import Tensor

from megalr.errors import exit_cleanly

Convert = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` in fp8 and the float32 number to multiply it by to have ``x`` again."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product_fp8(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """``left @ right^T`` in bf16 of converted (M, K) and (N, K)."""
    (p, scale_p), (q, scale_q) = left, right
    return torch._scaled_mm(p, q.t(), scale_p, scale_q, out_dtype=torch.bfloat16)


def operands(sizes: tuple[int, ...], n: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Gaussian bf16 tensors of one pair: a single B for all m, which is as much arithmetic."""
    torch.manual_seed(0)
    width = len(sizes) * RANK
    shapes = {"x": (tokens, n), "a": (width, n), "b": (sum(sizes), RANK), "dy": (tokens, sizes[0])}
    drawn = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    return {name: tensor.bfloat16() for name, tensor in drawn.items()}


def products(
    o: dict[str, Tensor], sizes: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """Name, left (M, K), right (N, K) and whether the left is a gradient, of every product.

    Operands that a product wants in the other order are made contiguous here.
    """
    z = (o["x"] @ o["a"].t()) / o["x"].shape[1] ** 0.5  # (T, g r)
    dz = torch.randn_like(z)
    yield "z = x A'", o["x"], o["a"], False
    for index, b in enumerate(o["b"].split(sizes)):
        part = z[:, index * RANK : (index + 1) * RANK].contiguous()  # (T, r)
        yield "y = z B'", part, b, False
        yield "dz = dy B", o["dy"], b.t().contiguous(), True
        yield "dB = dy' z", o["dy"].t().contiguous(), part.t().contiguous(), True
    yield "dx = dz A", dz, o["a"].t().contiguous(), True
    yield "dA = dz' x", dz.t().contiguous(), o["x"].t().contiguous(), True


def error(found: Tensor, left: Tensor, right: Tensor) -> float:
    """Relative Frobenius error against float64."""
    exact = left.double() @ right.double().t()
    return float((found.double() - exact).norm() / exact.norm())


def fp8_types(gradient: bool) -> tuple[torch.dtype, torch.dtype]:
    """Types of the two operands of a product."""
    return (torch.float8_e5m2 if gradient else torch.float8_e4m3fn), torch.float8_e4m3fn


def measure_group(
    sizes: tuple[int, ...], n: int, tokens: int, device: str, convert: Convert
) -> dict[str, dict[str, float]]:
    """Times in ms, summed over products of a name, and errors of the first of them."""
    rows: dict[str, dict[str, float]] = {}
    o = operands(sizes, n, tokens, device)
    for name, left, right, gradient in products(o, sizes):
        types = fp8_types(gradient)
        pair = to_fp8(left, types[0]), to_fp8(right, types[1])
        row = rows.setdefault(name, {})
        row.setdefault("error bf16", error(left @ right.t(), left, right))
        row.setdefault("error fp8", error(product_fp8(*pair), left, right))
        if device == "cpu":
            continue
        torch.compiler.reset()  # every product's conversions are compiled, whatever their number
        works: dict[str, Callable[[], object]] = {
            "bf16": lambda p=left, q=right: p @ q.t(),
            "fp8": lambda pair=pair: product_fp8(*pair),
            "conversions": lambda p=left, q=right, t=types: (convert(p, t[0]), convert(q, t[1])),
        }
        for kind, work in works.items():
            row[kind] = row.get(kind, 0.0) + milliseconds(work)
    return rows


def table(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each product, and the sum of all."""
    kinds = ("bf16", "fp8", "conversions", "error bf16", "error fp8")
    lines = [f"{'group':8} {'product':12}" + "".join(f"{kind:>13}" for kind in kinds)]
    for group, rows in groups.items():
        for name, row in rows.items():
            cells = "".join(f"{row[kind]:13.4f}" if kind in row else f"{'':13}" for kind in kinds)
            lines.append(f"{group:8} {name:12}{cells}")
    all_rows = [row for rows in groups.values() for row in rows.values()]
    sums = [sum(row.get(kind, 0.0) for row in all_rows) for kind in kinds[:3]]
    return "\n".join([*lines, f"{'sum':21}" + "".join(f"{total:13.4f}" for total in sums)])


def main() -> None:
    """Measure every group and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, help="folder of fp8.json; none is written else")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    convert = torch.compile(to_fp8, dynamic=False) if device == "cuda" else to_fp8
    results = {
        group: measure_group(sizes, n, arguments.tokens, device, convert)
        for group, (sizes, n) in GROUPS.items()
    }
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"{name}, torch {torch.__version__}, ms and relative errors\n{table(results)}", flush=True
    )
    save_measured("fp8", name, {"results": results}, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
