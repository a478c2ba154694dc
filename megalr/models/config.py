"""Sizes and choices that define a decoder, and the presets of the literature."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from megalr.errors import UserError


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. The defaults are LLaMA's choices (arXiv 2302.13971).

    Attributes:
        hidden_size: width h of the residual stream.
        intermediate_size: width of the MLP, without padding.
        num_layers: number of blocks.
        num_heads: query heads; h must be a multiple of it.
        num_kv_heads: key/value heads (GQA); must divide num_heads. None means num_heads.
        vocab_size: entries of the vocabulary, without padding.
        norm: ``rms`` or ``layer``.
        norm_eps: epsilon of the norms.
        positions: ``rope`` (half-split form) or ``learned``.
        rope_theta: base of RoPE.
        max_positions: rows of the learned position table; unused with rope.
        sliding_window: positions that a position sees, itself included; None means all.
        activation: ``silu``, ``gelu_tanh`` or ``relu``.
        gated_mlp: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
        attention_bias: bias on q, k, v.
        output_bias: bias on o and on the MLP's matrices.
        tie_embeddings: the head uses the embedding's weight.
        initializer_range: standard deviation of the initial dense weights and embeddings.
        pad_multiple: the MLP width and the vocabulary are stored as multiples of this.

    Raises:
        UserError: h is not a multiple of num_heads, or num_heads not of num_kv_heads.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    vocab_size: int = 32000
    norm: str = "rms"
    norm_eps: float = 1e-6
    positions: str = "rope"
    rope_theta: float = 10000.0
    max_positions: int = 2048
    sliding_window: int | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    pad_multiple: int = 64

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads "
                f"{self.num_heads}: choose sizes that divide"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.kv_heads}: choose sizes that divide"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head as stored."""
        return round_up(self.vocab_size, self.pad_multiple)

    @property
    def padded_intermediate_size(self) -> int:
        """Width of the MLP as stored."""
        return round_up(self.intermediate_size, self.pad_multiple)


def round_up(size: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(hidden, intermediate, layers, heads)


PRESETS: dict[str, DecoderConfig] = {
    "llama_9m": _llama(128, 352, 4, 4),
    "llama_20m": _llama(256, 688, 4, 4),
    "llama_60m": _llama(512, 1376, 8, 8),
    "llama_130m": _llama(768, 2048, 12, 12),
    "llama_350m": _llama(1024, 2736, 24, 16),
    "llama_1b": _llama(2048, 5461, 24, 32),
    "llama_3b": _llama(2560, 6848, 32, 32),
    "llama_7b": _llama(4096, 11008, 32, 32),
    "llama_13b": _llama(5120, 13824, 40, 40),
}
"""Sizes of the GaLore protocol, 9M to 7B (arXiv 2403.03507), and of LLaMA-13B
(arXiv 2302.13971); vocabulary 32,000."""


def decoder_config(preset: str | None, overrides: dict[str, Any]) -> DecoderConfig:
    """The preset with some fields replaced; without a preset the fields give all sizes.

    Raises:
        UserError: unknown preset (the nearest name is given) or sizes that do not fit.
    """
    known = {field.name for field in fields(DecoderConfig)}
    overrides = {key: value for key, value in overrides.items() if key in known}
    if preset is None:
        return DecoderConfig(**overrides)
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"model.preset {preset!r} is unknown; {hint}")
    return replace(PRESETS[preset], **overrides)
