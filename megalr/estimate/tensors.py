"""What a rank stores of a model: every tensor's size, worked out from the configuration alone.

Nothing is built: a 13B model takes a millisecond. tests/estimate compares the sizes with the
parameters of the decoder itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalr.errors import UserError
from megalr.models.build import FACTORIZED
from megalr.models.config import DecoderConfig

DENSE_INSIDE = ("lora", "relora")
"""Factorized methods that keep a frozen dense matrix beside the factors."""


@dataclass(frozen=True)
class Layout:
    """Tensor parallelism: ``size`` ranks, ``kind`` column_row or bottleneck.

    Raises:
        UserError: sizes that the model cannot be cut into.
    """

    size: int = 1
    kind: str = "column_row"

    @property
    def cut_residual(self) -> bool:
        """Whether the residual stream is cut along the hidden dimension."""
        return self.size > 1 and self.kind == "bottleneck"

    def check(self, sizes: DecoderConfig, method: Any) -> None:
        """Refuse what cannot be cut."""
        if self.kind not in ("column_row", "bottleneck"):
            raise UserError(f"layout {self.kind!r} is unknown: use column_row or bottleneck")
        if self.size < 1:
            raise UserError(f"tensor parallelism over {self.size} ranks: use 1 or more")
        if sizes.kv_heads % self.size:
            raise UserError(
                f"tensor parallelism over {self.size} ranks does not divide the {sizes.kv_heads} "
                "key/value heads of the model: use a divisor"
            )
        if self.cut_residual and method.name not in ("low_rank", "cola", "loro"):
            raise UserError(
                f"layout bottleneck with method.name={method.name}: it needs weights that are "
                "nothing but factors; use column_row"
            )


@dataclass(frozen=True)
class MatrixGroup:
    """The matrices of a block that read the same input, as stored, and their part on a rank.

    Attributes:
        name: qkv, o, into or down.
        n: columns, the same for all.
        rows: rows of each matrix.
        local_n, local_rows: what one tensor-parallel rank holds of a dense matrix.
        factorized: whether the method stores factors.
        used: ``(m, n)`` of each matrix without padding.
    """

    name: str
    n: int
    rows: tuple[int, ...]
    local_n: int
    local_rows: tuple[int, ...]
    factorized: bool
    target: bool
    used: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stored:
    """One tensor of a rank.

    Attributes:
        name: of the kind of tensor; equal ones of different blocks share it.
        numel: elements that this rank stores.
        group: parameter group: factors, targets, matrices or vectors; frozen (no gradient) or
            indices (int32 positions of SLTrain).
        block: whether it belongs to a block, so there are ``num_layers`` of it.
        matrices: ``(m, n)`` of the target matrices stacked in it, for optimizers that see them.
    """

    name: str
    numel: int
    group: str
    block: bool = False
    matrices: tuple[tuple[int, int], ...] = ()


def matrix_groups(sizes: DecoderConfig, method: Any, layout: Layout) -> list[MatrixGroup]:
    """The four groups of a block, in order: qkv, o, into, down."""
    h, kv = sizes.hidden_size, sizes.kv_heads * sizes.head_dim
    used, f = sizes.intermediate_size, sizes.padded_intermediate_size
    into = ("gate", "up") if sizes.gated_mlp else ("up",)
    targets = getattr(method, "targets", None)
    t = layout.size

    def group(name: str, members: tuple[str, ...], n: int, rows: tuple[int, ...]) -> MatrixGroup:
        target = targets is None or set(members) <= set(targets)
        reads_residual = name in ("qkv", "into")
        cut_columns = layout.cut_residual or not reads_residual
        cut_rows = layout.cut_residual or reads_residual
        return MatrixGroup(
            name,
            n,
            rows,
            n // t if cut_columns else n,
            tuple(m // t for m in rows) if cut_rows else rows,
            method.name in FACTORIZED and target,
            target,
            tuple((used if m == f else m, used if n == f else n) for m in rows)
            if name in ("into", "down")
            else tuple((m, n) for m in rows),
        )

    return [
        group("qkv", ("q", "k", "v"), h, (h, kv, kv)),
        group("o", ("o",), h, (h,)),
        group("into", into, h, (f,) * len(into)),
        group("down", ("down",), f, (h,)),
    ]


def stored_tensors(sizes: DecoderConfig, method: Any, layout: Layout | None = None) -> list[Stored]:
    """Every tensor that one tensor-parallel rank stores, before ZeRO cuts anything.

    Raises:
        UserError: a layout that does not fit the model.
    """
    layout = layout or Layout()
    layout.check(sizes, method)
    h, rows = sizes.hidden_size, sizes.padded_vocab_size // layout.size
    norm = h // layout.size if layout.cut_residual else h
    tensors = [Stored("embedding", rows * h, "matrices")]
    if sizes.positions == "learned":
        tensors.append(Stored("positions", sizes.max_positions * h, "matrices"))
    for name in ("attention_norm", "mlp_norm", "norm"):
        tensors.append(Stored(name, norm, "vectors", block=name != "norm"))
    if not sizes.tie_embeddings:
        tensors.append(Stored("head", rows * h, "matrices"))
    for group in matrix_groups(sizes, method, layout):
        tensors += _stored_of_group(group, method, layout)
        if sizes.attention_bias if group.name == "qkv" else sizes.output_bias:
            bias = sum(group.local_rows)
            tensors.append(Stored(f"{group.name}.bias", bias, "vectors", block=True))
    return tensors


def _stored_of_group(group: MatrixGroup, method: Any, layout: Layout) -> Iterator[Stored]:
    dense = group.local_n * sum(group.local_rows)
    matrices = tuple(zip(group.local_rows, (group.local_n,) * len(group.rows), strict=True))
    if not group.factorized:
        kind = "targets" if group.target else "matrices"
        yield Stored(f"{group.name}.weight", dense, kind, True, matrices)
        return
    r, count = method.rank, len(group.rows)
    a, b = count * r * group.local_n, sum(group.local_rows) * r
    factors = ((r, group.local_n),) * count, tuple((m, r) for m in group.local_rows)
    yield Stored(f"{group.name}.a", a, "factors", True, factors[0])
    yield Stored(f"{group.name}.b", b, "factors", True, factors[1])
    if method.name in DENSE_INSIDE:
        yield Stored(f"{group.name}.weight", dense, "frozen", True)
    if method.name == "sltrain":
        # Positions are drawn over the whole matrix; a rank holds its share of them on average.
        entries = sum(int(method.density * m * n) for m, n in group.used) / layout.size
        yield Stored(f"{group.name}.values", math.ceil(entries), "matrices", True)
        yield Stored(f"{group.name}.support", math.ceil(entries), "indices", True)


def count(tensors: list[Stored], layers: int, *groups: str) -> int:
    """Elements of all tensors of these groups, blocks counted ``layers`` times."""
    return sum(t.numel * (layers if t.block else 1) for t in tensors if t.group in groups)


TRAINED = ("factors", "targets", "matrices", "vectors")
"""Groups that have gradients."""
