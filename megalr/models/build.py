"""From a method's settings to a decoder with the right kind of linear layers."""

from __future__ import annotations

from typing import Any

from megalr.errors import UserError
from megalr.layers.factors import LinearShape
from megalr.layers.linear import FullRankLinear, GroupedLinear, LowRankLinear
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder, MakeLinear


def projection_names(shape: LinearShape) -> list[str]:
    """Short names of a group's matrices: ``["q", "k", "v"]``."""
    return [name.rsplit(".", 1)[1] for name in shape.names]


def make_linear_of(method: Any) -> MakeLinear:
    """The builder of linear layers for a method.

    Raises:
        UserError: rank larger than a matrix, or targets that split a group.
    """
    if method.name == "low_rank":
        return lambda shape, bias: _low_rank(method, shape, bias)
    return FullRankLinear


def _low_rank(method: Any, shape: LinearShape, bias: bool) -> GroupedLinear:
    names = projection_names(shape)
    chosen = [name for name in names if name in method.targets]
    if not chosen:
        return FullRankLinear(shape, bias)
    if chosen != names:
        raise UserError(
            f"method.targets names {', '.join(chosen)} but not "
            f"{', '.join(n for n in names if n not in chosen)}: {', '.join(names)} read the same "
            "input and are stored together, so name all of them or none"
        )
    sides = [min(shape.in_used, rows) for rows in shape.out_used]
    if method.rank > min(sides):
        raise UserError(
            f"method.rank {method.rank} is larger than {min(sides)}, the smaller side of "
            f"{shape.names[sides.index(min(sides))]}: choose a rank of at most {min(sides)}"
        )
    return LowRankLinear(shape, method.rank, method.alpha, method.init, bias)


def build_decoder(
    config: DecoderConfig, method: Any, seed: int, checkpoint_blocks: bool = False
) -> Decoder:
    """A decoder in float32 on the default device with weights drawn from ``seed``."""
    decoder = Decoder(config, make_linear_of(method), checkpoint_blocks)
    decoder.reset_parameters(seed)
    return decoder
