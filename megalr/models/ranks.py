"""Which rank each factorized matrix has: ``method.rank``, or an entry of ``method.ranks``.

The entries map names to ranks, in the words of ``megalr.factorize_``: the last parts of a matrix's
name (``down``, ``attention.q``), its full name (``layers.3.mlp.down``), or a pattern with ``*`` for
the full name (``layers.0.*``). Of several entries that name a matrix the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from megalr.errors import UserError
from megalr.layers.factors import LinearShape
from megalr.models.config import DecoderConfig


def is_named(name: str, word: str) -> bool:
    """Whether ``word`` names the matrix or linear of the full name ``name``."""
    return fnmatchcase(name, word) if "*" in word else f".{name}".endswith(f".{word}")


def matrix_names(config: DecoderConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """Full names of a layer's matrices, by group: qkv, o, into, down."""
    attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
    into = ("gate", "up") if config.gated_mlp else ("up",)
    return {
        "qkv": tuple(f"{attention}.{name}" for name in ("q", "k", "v")),
        "o": (f"{attention}.o",),
        "into": tuple(f"{mlp}.{name}" for name in into),
        "down": (f"{mlp}.down",),
    }


def rank_of(method: Any, name: str) -> int:
    """The rank of the factorized matrix ``name``."""
    return _chosen(method, name)[0]


def _chosen(method: Any, name: str) -> tuple[int, str]:
    """The rank, and how the configuration gives it."""
    for word, rank in reversed(_entries(method).items()):
        if is_named(name, word):
            return rank, f"method.ranks {word!r} = {rank}"
    return method.rank, f"method.rank {method.rank}"


def _entries(method: Any) -> dict[str, int]:
    return getattr(method, "ranks", None) or {}


def has_ranks(method: Any) -> bool:
    """Whether matrices may differ in rank, so that layers may differ in shape."""
    return bool(_entries(method))


def ranks_of(method: Any, shape: LinearShape) -> tuple[int, ...]:
    """The ranks of the matrices of a group.

    Raises:
        UserError: a rank beyond the smaller side of its matrix.
    """
    found = [_chosen(method, name) for name in shape.names]
    sides = [min(shape.in_used, rows) for rows in shape.out_used]
    wrong = [
        (side, given, name)
        for name, side, (rank, given) in zip(shape.names, sides, found, strict=True)
        if rank > side
    ]
    if wrong:
        side, given, name = min(wrong, key=lambda found: found[0])  # what it has to fit in the end
        raise UserError(
            f"{given} is larger than {side}, the smaller side of {name}: choose a rank of at "
            f"most {side}"
        )
    return tuple(rank for rank, _ in found)


def check_names(config: DecoderConfig, method: Any) -> None:
    """Check that every entry of ``method.ranks`` names a factorized matrix of the model.

    Raises:
        UserError: one that names none.
    """
    if not has_ranks(method):
        return
    names: Sequence[str] = [
        name
        for layer in range(config.num_layers)
        for group in matrix_names(config, layer).values()
        for name in group
        if name.rsplit(".", 1)[1] in method.targets
    ]
    for word in _entries(method):
        if not any(is_named(name, word) for name in names):
            short = dict.fromkeys(name.split(".", 2)[2] for name in names)
            raise UserError(
                f"method.ranks {word!r} names no factorized matrix: there are "
                f"{', '.join(f'layers.*.{name}' for name in short)} in layers 0 to "
                f"{config.num_layers - 1}; give last parts such as down, a full name, or a "
                "pattern with * for it"
            )
