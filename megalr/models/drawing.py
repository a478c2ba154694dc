"""Drawing the weights of a decoder, piece by piece.

A piece is the embedding, the table of positions, a block, the final norm or the head. Every matrix
is drawn in float32 and rounded to the dtype of its parameter at once, so a drawn model has the bits
of one drawn whole in float32 and rounded afterwards, but never needs that memory.

Where ranks share the weights out (ZeRO 3), not even the rounded model has room on one of them.
Its decoder is built empty: parameters have their shapes, dtype, device and marks, but no memory.
A piece at a time is held, filled and handed to the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalr.layers.embedding import Embedding, init_rows
from megalr.layers.head import Head
from megalr.layers.linear import GroupedLinear
from megalr.layers.mixed_ranks import MixedRankLinear
from megalr.models.decoder import Decoder

Fill = Callable[[nn.Module], None]
"""Sets all weights of a piece that is held."""


def pieces(decoder: Decoder) -> list[nn.Module]:
    """The pieces, in the order of the decoder's parameters; together they hold all of them."""
    before = [piece for piece in (decoder.embedding, decoder.positions) if piece is not None]
    return [*before, *decoder.blocks(), decoder.norm, decoder.head]


@torch.no_grad()
def draw_piece(decoder: Decoder, piece: nn.Module, seed: int) -> None:
    """Draw the matrices of a piece from ``seed`` and their names; padding is 0.

    The draws do not depend on ranks, order or dtype but for the rounding. Norms (1) and biases (0)
    have been set by their constructors.
    """
    std = decoder.config.initializer_range
    if piece is decoder.positions:
        init_rows(piece.weight, decoder.config.position_rows, seed, "positions", std)
    for module in piece.modules():
        if isinstance(module, MixedRankLinear):
            continue  # its parts come by themselves
        if isinstance(module, Embedding | Head | GroupedLinear):
            module.reset_parameters(seed, std)


def draw_weights(decoder: Decoder, seed: int) -> None:
    """Draw all weights from ``seed``."""
    for piece in pieces(decoder):
        draw_piece(decoder, piece, seed)


def _filled_later(piece: nn.Module) -> list[nn.Parameter]:
    """The parameters that drawing sets: matrices, and the sparse values of SLTrain."""
    return [p for p in piece.parameters() if p.dim() > 1 or hasattr(p, "row_blocks")]


def release(piece: nn.Module) -> None:
    """Give back the memory of the matrices of a piece; norms and biases stay."""
    for parameter in _filled_later(piece):
        parameter.untyped_storage().resize_(0)


def hold(piece: nn.Module) -> None:
    """Allocate the memory that :func:`release` gave back; its contents are undefined."""
    for parameter in _filled_later(piece):
        parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
