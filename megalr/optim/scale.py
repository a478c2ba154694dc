"""SCALE: gradients normalized row by row, momentum for the output head alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megalr.config.optimizers import SCALEOptimizer
from megalr.errors import UserError
from megalr.optim import adam_h
from megalr.optim.sharded_optimizer import ShardedOptimizer, scalar_dtype
from megalr.sharding.exchange import reduce_over_ranks
from megalr.sharding.fragment import FlatLayout, Fragment, LogicalTensor

SMALLEST = 1e-8
"""Lower bound of a root mean square, as published; rows without gradient stay where they are."""
KINDS = ("matrices", "embedding", "head", "vectors")


class SCALE(ShardedOptimizer):
    """SCALE (Glentis et al. 2025, arXiv 2506.16659; docs/methods/optimizers.md).

    With C(G) = G / max(rms, 1e-8), the root mean square taken over each row, the inputs of one
    output, and the ``kind`` of a parameter group:

    * ``matrices``: W <- (1 - lr * weight_decay) W - lr C(G);
    * ``head``: the same with M <- momentum * M + (1 - momentum) G in place of G;
    * ``embedding``: the same with G, and each column normalized over the vocabulary, a row of the
      table being one input;
    * ``vectors``: Adam with eps outside the bias correction, after the same decay;
    * None: ``matrices`` for parameters of two or more dimensions (n: all but the first), else
      ``vectors``.

    The paper stores W transposed and calls the rows columns. State: the head's momentum and two
    moments of the vectors. Sums of squares are fp32 at least.
    """

    declared = (SCALEOptimizer,)
    marks: ClassVar[dict[str, Any]] = {"kind": None}
    apart: ClassVar[tuple[str, ...]] = ("embedding", "head", "sparse")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        kind = group["kind"]
        if kind is not None and kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, or None, got {kind!r}")
        for parameter in group["params"]:
            for tensor in self.layout(parameter).tensors:
                if kind not in (None, "vectors") and len(tensor.shape) < 2:
                    raise UserError(
                        f"SCALE normalizes rows of matrices; {tensor.name} has shape "
                        f'{tensor.shape}: put it into a group with kind "vectors"'
                    )

    def _update(
        self,
        parameter: torch.Tensor,
        flat: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        state, layout, lr = self.state[parameter], self.layout(parameter), group["lr"]
        dtype = self._moment_dtype(parameter)
        state["step"] = state.get("step", 0) + 1
        if group["weight_decay"] > 0:
            flat.mul_(1 - lr * group["weight_decay"])
        kind = group["kind"] or _kind_of(layout)
        if kind == "vectors":
            size = adam_h.step_size(lr, group["betas"], state["step"])
            adam_h.update_flat(flat, grad, state, group, (size, 0.0), dtype)
            return
        if kind == "head":
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(flat, dtype=dtype)
            grad = state["momentum_buffer"].lerp_(grad.to(dtype), 1 - group["momentum"])
        _move(layout, flat, grad, lr, columns=kind == "embedding")


def _kind_of(layout: FlatLayout) -> str:
    """The kind of a group without one."""
    return "matrices" if all(len(tensor.shape) > 1 for tensor in layout.tensors) else "vectors"


@dataclass(frozen=True)
class _Block:
    """Whole rows, or a part of one row, of a matrix: ``shape`` elements at ``offset`` of a flat
    tensor, the first of them in ``row`` and ``column``."""

    offset: int
    row: int
    column: int
    shape: tuple[int, int]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The block as a 2-D view of a flat tensor."""
        return flat.narrow(0, self.offset, math.prod(self.shape)).view(self.shape)

    def part(self, line: torch.Tensor, columns: bool) -> torch.Tensor:
        """Of a number for each column (row) of the matrix those of the block: (1, c) or (r, 1)."""
        if columns:
            return line.narrow(0, self.column, self.shape[1])[None, :]
        return line.narrow(0, self.row, self.shape[0])[:, None]


def _blocks(fragment: Fragment, width: int) -> Iterator[_Block]:
    """The end of a row, whole rows of ``width`` elements, the start of a row: what there is."""
    place = fragment.start
    while place < fragment.stop:
        row, column = divmod(place, width)
        rows = (fragment.stop - place) // width if column == 0 else 0
        shape = (rows, width) if rows else (1, min(width - column, fragment.stop - place))
        yield _Block(fragment.offset + place - fragment.start, row, column, shape)
        place += math.prod(shape)


def _move(
    layout: FlatLayout, flat: torch.Tensor, grad: torch.Tensor, lr: float, columns: bool
) -> None:
    """W <- W - lr C(G) of the matrices in one flat tensor, by columns or by rows.

    A row that lies on several ranks, and every column of a split matrix, is completed by one
    all-reduce of the sums of squares, for all matrices of the layout together.
    """
    shared = [tensor for tensor in layout.tensors if _is_cut(tensor, columns)]
    names = {tensor.name for tensor in shared}
    whole = [tensor for tensor, _ in layout.local if tensor.name not in names]
    lengths = [_lines(tensor, columns) for tensor in (*shared, *whole)]
    sums = grad.new_zeros(sum(lengths), dtype=scalar_dtype(grad.dtype))
    lines = {t.name: s for t, s in zip((*shared, *whole), sums.split(lengths), strict=True)}
    pieces = [
        (lines[tensor.name], block)
        for tensor, fragment in layout.local
        for block in _blocks(fragment, _width(tensor))
    ]
    axis = 0 if columns else 1
    for line, block in pieces:
        norms = torch.linalg.vector_norm(block.of(grad), dim=axis, keepdim=True, dtype=sums.dtype)
        block.part(line, columns).add_(norms.square_())
    if shared:
        reduce_over_ranks(sums[: sum(lengths[: len(shared)])], layout.ranks, dist.ReduceOp.SUM)
    for tensor in (*shared, *whole):
        count = _width(tensor) if not columns else _lines(tensor, columns=False)
        lines[tensor.name].div_(count).sqrt_().clamp_min_(SMALLEST)
    for line, block in pieces:
        block.of(flat).addcdiv_(block.of(grad), block.part(line, columns), value=-lr)


def _is_cut(tensor: LogicalTensor, columns: bool) -> bool:
    """Whether some row, or the columns, lie on more than one rank; the same on all ranks."""
    width = _width(tensor)
    return tensor.is_split and (columns or any(f.start % width for f in tensor.fragments))


def _width(tensor: LogicalTensor) -> int:
    """Elements of a row; a tensor of more than two dimensions counts as (first, all others)."""
    return math.prod(tensor.shape[1:])


def _lines(tensor: LogicalTensor, columns: bool) -> int:
    """Number of columns or of rows."""
    return _width(tensor) if columns else tensor.shape[0]
