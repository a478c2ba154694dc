"""A checkpoint's weights at other ranks: every product B A cut or extended, in one process.

The shapes of an engine's parameters are fixed: they are views into flat buffers that ZeRO divides
at the start, and the optimizer's states have the same layout. So rank moves between two runs: a
universal checkpoint of update 0 is written, from which a run starts as a fork.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalr.checkpoint.choose_ranks import Spectrum, as_entries
from megalr.checkpoint.directory import CHECKPOINTS, tag_of, universal_tag
from megalr.checkpoint.manifest import Damaged
from megalr.checkpoint.reader import Checkpoint
from megalr.checkpoint.reshape import write_whole
from megalr.checkpoint.source import WORKING_DIRECTORY, SavedState, StateSource, TensorState, whole
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.layers.factors import named_generator
from megalr.models.build import build_decoder, sizes_of
from megalr.models.decoder import Decoder

LIVING = 1e-13
"""Singular values below this share of the largest are rounding in float64: those directions are
dead, and are replaced by new ones."""


@dataclass(frozen=True)
class _Factors:
    """Where the factors of one matrix are: names and rows of parameters, and the sizes in use."""

    a: str
    a_rows: slice
    b: str
    b_rows: slice
    scale: float
    size: tuple[int, int]

    @property
    def rank(self) -> int:
        return int(self.a_rows.stop - self.a_rows.start)


def _empty_decoder(config: RunConfig) -> Decoder:
    with torch.device("meta"):
        return build_decoder(sizes_of(config), config.method, config.run.seed, initialize=False)


def _factors_of(decoder: Decoder) -> dict[str, _Factors]:
    """The factors of every matrix that is a product of two, by its name."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    return {
        pair.name: _Factors(
            names[id(pair.a)],
            slice(*pair.a_rows),
            names[id(pair.b)],
            slice(*pair.b_rows),
            pair.scale,
            (layer.shape.out_used[index], layer.shape.in_used),
        )
        for layer in decoder.linears()
        for index, pair in enumerate(layer.factor_pairs())
    }


def _read(source: StateSource, at: _Factors) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n) of a matrix without padding, float64."""
    m, n = at.size
    b, a = whole(source, at.b)[at.b_rows], whole(source, at.a)[at.a_rows]
    return b[:m].double(), a[:, :n].double()


def _decomposed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), V^T (r, n) of B A, from r x r matrices, for r up to the smaller side."""
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u, s, vh @ q2.mT


def measured_spectra(checkpoint: Checkpoint) -> list[Spectrum]:
    """Singular values of every ``W = (alpha/r) B A`` of a run's checkpoint, in float64.

    Raises:
        UserError: the method has no products of factors.
    """
    found = _factors_of(_empty_decoder(checkpoint.config))
    if not found or not hasattr(checkpoint.config.method, "ranks"):
        raise UserError(
            f"{checkpoint.folder}: method {checkpoint.config.method.name} has no products of two "
            "factors with ranks of their own, so there is nothing to choose"
        )
    return [
        Spectrum(name, at.size, tuple((at.scale * values).tolist()))
        for name, at in found.items()
        for values in (_decomposed(*_read(checkpoint.source, at))[1],)
    ]


def best_of_rank(
    b: Tensor, a: Tensor, rank: int, ratio: float, draw: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of ``ratio B A`` that has rank ``rank``, float64.

    Directions beyond those of B A, which has fewer, get a column of zeros in B and a row from
    ``draw`` in A: the product does not change, and gradients reach B.

    Args:
        b, a: (m, r) and (r, n) float64.
        rank: r' of the result.
        ratio: old scale over new scale.
        draw: gives rows for A, (count, n).
    """
    u, s, vh = _decomposed(b, a)
    living = min(rank, int((s > LIVING * s[0]).sum()))
    root = (ratio * s[:living]).sqrt()
    new_b = b.new_zeros(b.shape[0], rank)
    new_b[:, :living] = u[:, :living] * root
    rows = [root[:, None] * vh[:living], draw(rank - living).to(a)]
    return new_b, torch.cat(rows)


class OtherRanks:
    """A checkpoint as the state of update 0 of a run whose matrices have other ranks.

    Weights only; see :class:`megalr.checkpoint.source.StateSource`. Factors are balanced and the
    best of their rank in float64; all else is as it was.
    """

    def __init__(self, checkpoint: Checkpoint, ranks: Mapping[str, int]) -> None:
        old = checkpoint.config
        method: Any = old.method
        update = {"ranks": as_entries(ranks, method.rank) or None}
        config = old.model_copy(update={"method": method.model_copy(update=update)})
        kept = checkpoint.state.keys() & {WORKING_DIRECTORY}
        state = {"tokens": 0, **{key: checkpoint.state[key] for key in kept}}
        counters = dict.fromkeys(checkpoint.source.saved.engine, 0)
        self.saved = SavedState(0, config.model_dump(mode="json"), counters, state)
        self._source, self._seed = checkpoint.source, old.run.seed
        before, after = _empty_decoder(old), _empty_decoder(config)
        self._before, self._after = _factors_of(before), _factors_of(after)
        self._parameters: dict[str, nn.Parameter] = dict(after.named_parameters())
        self._blocks = {
            block: (name, slice(start, stop))
            for name, parameter in before.named_parameters()
            for block, start, stop in getattr(parameter, "row_blocks", ())
        }
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def trained(self, name: str) -> bool:
        return self._parameters[name].requires_grad

    def element_states(self, name: str) -> list[str]:
        return []

    def scalars(self, name: str) -> dict[str, Any]:
        return {}

    def logical_tensors(self) -> list[str]:
        return []

    def tensor_state(self, logical: str) -> TensorState:
        return TensorState()

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        blocks = getattr(self._parameters[name], "row_blocks", ())
        if not blocks:
            return self._source.elements(name, key, start, stop)
        dtype = self._source.elements(self._blocks[blocks[0][0]][0], key, 0, 1).dtype
        stack = torch.zeros(self.shape(name), dtype=dtype)
        for block, first, _ in blocks:
            part = self._block(block)
            rows = stack[first : first + len(part)]
            (rows[:, : part.shape[1]] if part.dim() > 1 else rows).copy_(part)
        return stack.view(-1)[start:stop]

    def _block(self, block: str) -> Tensor:
        """The rows of a stack that belong to one logical tensor; factors without padding."""
        matrix, _, side = block.rpartition(".")
        if side not in ("A", "B") or matrix not in self._after:
            name, rows = self._blocks[block]
            return whole(self._source, name)[rows]
        if matrix not in self._found:
            if len(self._found) > 8:  # a group's factors follow each other
                self._found.clear()
            self._found[matrix] = self._resized(matrix)
        return self._found[matrix]["BA".index(side)]

    def _resized(self, matrix: str) -> tuple[Tensor, Tensor]:
        before, after = self._before[matrix], self._after[matrix]

        def draw(count: int) -> Tensor:
            n = after.size[1]
            generator = named_generator(self._seed, f"{matrix}.A.new", torch.device("cpu"))
            return torch.empty(count, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)

        b, a = _read(self._source, before)
        try:
            return best_of_rank(b, a, after.rank, before.scale / after.scale, draw)
        except torch.linalg.LinAlgError as failure:
            raise Damaged(f"the factors of {matrix} cannot be decomposed ({failure})") from failure


def write_other_ranks(
    checkpoint: Checkpoint,
    ranks: Mapping[str, int],
    output: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the folder that a run with these ranks forks from; returns the checkpoint in it.

    Raises:
        UserError: the checkpoint is damaged, or the folder cannot be written.
    """
    source = OtherRanks(checkpoint, ranks)
    tag = universal_tag(tag_of(0))
    return write_whole(checkpoint, source, output / CHECKPOINTS, tag, None, progress)
