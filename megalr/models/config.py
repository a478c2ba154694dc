"""Sizes and choices that define a decoder, and the presets of the literature."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from megalr.config.model import RopeScaling
from megalr.errors import UserError


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. The defaults are LLaMA's choices (arXiv 2302.13971).

    Attributes:
        hidden_size: width h of the residual stream.
        intermediate_size: width of the MLP, without padding.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads (GQA); must divide num_heads. None means num_heads.
        head_dim: width of a head; None means h / num_heads. num_heads * head_dim need not be h.
        vocab_size: entries of the vocabulary, without padding.
        norm: ``rmsnorm``, or ``layernorm``, which has biases.
        norm_eps: epsilon of all norms.
        norm_order: ``pre``, ``x + f(norm x)``, or ``post``, ``x + norm f(x)`` (OLMo-2, arXiv
            2501.00656).
        qk_norm: RMSNorm of queries and keys before the rotation: ``none``; ``head``, over each head
            with one weight for all heads (Qwen3, arXiv 2505.09388); ``full``, over all heads
            together (OLMo-2).
        positions: ``rope`` (half-split form) or ``learned``.
        rope_theta: base of RoPE.
        rope_scaling: how its frequencies are stretched; None: not.
        partial_rotary_factor: share of a head's dimensions, the first ones, that are rotated.
        rope_layers: whether a layer rotates q and k. A pattern: it is repeated over the layers, so
            its length divides num_layers. None means all (NoPE layers: SmolLM3).
        max_positions: rows of the table of learned positions; unused with rope.
        sliding_window: positions that a position sees, itself included; None means all.
        window_layers: whether a layer has the sliding window; a pattern as rope_layers.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        gated_mlp: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
        attention_bias: bias on q, k, v.
        output_bias: bias on o and on the MLP's matrices.
        tie_embeddings: the head uses the embedding's weight.
        initializer_range: standard deviation of the initial dense weights and embeddings.
        pad_multiple: the MLP width and the vocabulary are stored as multiples of this.

    Raises:
        UserError: sizes that do not divide, a rotary width that is odd, a pattern that does not fit
            the layers, window_layers without a window, a base of RoPE that yarn cannot scale, or
            learned positions without their number or with settings of RoPE.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_order: str = "pre"
    qk_norm: str = "none"
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    rope_layers: tuple[bool, ...] | None = None
    max_positions: int | None = None
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    pad_multiple: int = 64

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads "
                f"{self.num_heads}: choose sizes that divide, or give model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.kv_heads}: choose sizes that divide"
            )
        if self.positions == "rope" and (self.rotary_width % 2 or not self.rotary_width):
            raise UserError(
                f"{self.rotary_width} of a head's {self.head_width} dimensions (model.head_dim x "
                f"model.partial_rotary_factor {self.partial_rotary_factor:g}) would be rotated: "
                "RoPE turns pairs, so choose an even number above 0"
            )
        if self.positions == "learned":
            self._check_learned_positions()
        for name in ("rope_layers", "window_layers"):
            pattern = getattr(self, name)
            if pattern is not None and (not pattern or self.num_layers % len(pattern)):
                raise UserError(
                    f"model.{name} has {len(pattern)} values for {self.num_layers} layers: give "
                    "one for each layer, or a pattern whose length divides model.num_layers"
                )
        scaling = self.rope_scaling
        if scaling is not None and scaling.type == "yarn" and self.rope_theta <= 1:
            raise UserError(
                f"model.rope_theta {self.rope_theta:g} must be above 1 with rope_scaling yarn"
            )
        if self.window_layers is not None and self.sliding_window is None:
            raise UserError("model.window_layers is given without model.sliding_window: give both")

    def _check_learned_positions(self) -> None:
        if self.max_positions is None:
            raise UserError(
                "model.positions learned needs model.max_positions, the rows of their table: give "
                "at least data.sequence_length"
            )
        given = {
            "rope_scaling": self.rope_scaling is not None,
            "rope_layers": self.rope_layers is not None,
            "partial_rotary_factor": self.partial_rotary_factor != 1,
        }
        if unused := [name for name, there in given.items() if there]:
            raise UserError(
                f"model.{unused[0]} is given with model.positions learned, where nothing is "
                "rotated: leave it out"
            )

    @property
    def head_width(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def q_width(self) -> int:
        """Width of the queries of all heads, and of attention's output."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.kv_heads * self.head_width

    @property
    def qk_norm_widths(self) -> tuple[int, ...]:
        """Widths of the weights of the norms of q and k; none without these norms."""
        head, full = (self.head_width,) * 2, (self.q_width, self.kv_width)
        return {"none": (), "head": head, "full": full}[self.qk_norm]

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions; 0 without one."""
        return (self.max_positions or 0) if self.positions == "learned" else 0

    def rotates(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has rotary positions."""
        pattern = self.rope_layers
        return self.positions == "rope" and (pattern is None or pattern[layer % len(pattern)])

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, counted from 0; None: it sees all earlier positions."""
        pattern = self.window_layers
        return self.sliding_window if pattern is None or pattern[layer % len(pattern)] else None

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


def _qwen3(hidden: int, intermediate: int) -> DecoderConfig:
    return DecoderConfig(
        hidden,
        intermediate,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        qk_norm="head",
        rope_theta=1e6,
        tie_embeddings=True,
    )


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
    "llama3_8b": DecoderConfig(
        4096,
        14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        norm_eps=1e-5,
        rope_theta=5e5,
    ),
    "qwen3_0.6b": _qwen3(1024, 3072),
    "qwen3_1.7b": _qwen3(2048, 6144),
    "gpt2_124m": DecoderConfig(
        768,
        3072,
        num_layers=12,
        num_heads=12,
        vocab_size=50_257,
        norm="layernorm",
        norm_eps=1e-5,
        positions="learned",
        max_positions=1024,
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        tie_embeddings=True,
    ),
}
"""Sizes of the GaLore protocol, 9M to 7B (arXiv 2403.03507), of LLaMA-13B (arXiv 2302.13971) with a
vocabulary of 32,000; of Llama 3 8B (arXiv 2407.21783, without the later scaling of RoPE) and of
Qwen3 0.6B and 1.7B (arXiv 2505.09388), with the vocabularies of their published models; of the
smallest GPT-2 (Radford et al., 2019), whose weights all start from one standard deviation here."""


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
