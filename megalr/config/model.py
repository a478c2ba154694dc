"""Section ``model``: the decoder's sizes and choices.

What they mean in full is in ``megalr.models.config``, what scaled rotary positions are in
``megalr.models.rope``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from megalr.config.base import AsTuple, Folder, Section

SCALING_KEYS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_positions"),
        ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
}
"""Keys that a kind of scaling needs, and those it may have."""


class RopeScaling(Section):
    """Stretched rotary positions: a model trained on short sequences reads longer ones.

    linear (arXiv 2306.15595): all frequencies are divided by factor. llama3 (Llama 3.1): only those
    of wavelengths longer than original_max_positions / low_freq_factor; those shorter than
    original_max_positions / high_freq_factor stay, in between the two are mixed. yarn (arXiv
    2309.00071): a ramp over the dimensions, and cosines and sines are multiplied by
    attention_factor.
    """

    type: Literal["linear", "llama3", "yarn"] = Field(examples=["llama3"])
    """Kind of scaling. dynamic and longrope, which depend on the length of a sequence, are not
    supported."""
    factor: float = Field(ge=1, le=1e6, examples=[32.0])
    """How many times longer sequences become."""
    original_max_positions: int | None = Field(default=None, ge=1, le=1 << 40, examples=[8192])
    """Longest sequence before scaling (tokens); llama3 and yarn need it."""
    low_freq_factor: float | None = Field(default=None, gt=0, le=1e6, examples=[1.0])
    """llama3: wavelengths longer than original_max_positions / this are stretched by factor."""
    high_freq_factor: float | None = Field(default=None, gt=0, le=1e6, examples=[4.0])
    """llama3: wavelengths shorter than original_max_positions / this are not stretched."""
    beta_fast: float | None = Field(default=None, gt=0, le=1e9, examples=[32.0])
    """yarn: dimensions that turn more often than this within original_max_positions are not
    stretched; null = 32."""
    beta_slow: float | None = Field(default=None, gt=0, le=1e9, examples=[1.0])
    """yarn: dimensions that turn less often than this are stretched by factor; null = 1."""
    attention_factor: float | None = Field(default=None, gt=0, le=1e6, examples=[1.35])
    """yarn: multiplies cosines and sines, so scores by its square; null = 0.1 ln(factor) + 1."""
    truncate: bool | None = Field(default=None, examples=[True])
    """yarn: whether the ends of the ramp are rounded to whole dimensions; null = true."""

    @model_validator(mode="after")
    def _has_the_keys_of_its_type(self) -> RopeScaling:
        needed, optional = SCALING_KEYS[self.type]
        given = {name for name, value in self if value is not None and name != "type"}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"type {self.type} needs {' and '.join(missing)} too")
        if unused := sorted(given - {*needed, *optional}):
            raise ValueError(f"type {self.type} does not use {', '.join(unused)}: leave it out")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        return self


Pattern = Annotated[tuple[bool, ...], AsTuple]
"""One value for each layer, or a pattern that is repeated over the layers."""


class ModelConfig(Section):
    """The decoder: a named preset, single values of which can be replaced, or a pretrained one."""

    from_pretrained: Folder | None = Field(
        default=None, min_length=1, examples=["models/llama-2-7b"]
    )
    """Folder of a Hugging Face model that the run starts from (LLaMA, Mistral, Qwen2, Qwen3,
    SmolLM3, OLMo-2, Phi-3 or GPT-2), instead of preset and random weights; on the command line it
    replaces a file's preset. The sizes come from it: leave the keys below out, or give the same."""
    preset: str | None = Field(
        default=None, min_length=1, validate_default=True, examples=["llama_60m"]
    )
    """Name of the model: llama_9m, llama_20m, llama_60m, llama_130m, llama_350m, llama_1b,
    llama_3b, llama_7b, llama_13b, llama3_8b, qwen3_0.6b, qwen3_1.7b or gpt2_124m; required without
    from_pretrained. The keys below replace single values of it; null keeps the preset's."""
    hidden_size: int | None = Field(default=None, ge=1, le=1_000_000, examples=[512])
    """Width of the residual stream."""
    intermediate_size: int | None = Field(default=None, ge=1, le=10_000_000, examples=[1376])
    """Width of the MLP."""
    num_layers: int | None = Field(default=None, ge=1, le=100_000, examples=[8])
    """Number of decoder layers."""
    num_heads: int | None = Field(default=None, ge=1, le=100_000, examples=[8])
    """Number of query heads of each layer."""
    num_kv_heads: int | None = Field(default=None, ge=1, le=100_000, examples=[8])
    """Number of key and value heads of each layer; a divisor of num_heads."""
    head_dim: int | None = Field(default=None, ge=1, le=1 << 14, examples=[128])
    """Width of a head; null = the preset's, else hidden_size / num_heads."""
    vocab_size: int | None = Field(default=None, ge=2, le=2_000_000_000, examples=[32000])
    """Number of token ids; must cover every id in the data."""
    norm: Literal["rmsnorm", "layernorm"] | None = Field(default=None, examples=["layernorm"])
    """rmsnorm: weights only (LLaMA). layernorm: subtracts the mean, and has biases (GPT-2)."""
    norm_eps: float | None = Field(default=None, gt=0, examples=[1e-6])
    """Added to the variance in the norms."""
    norm_order: Literal["pre", "post"] | None = Field(default=None, examples=["post"])
    """pre: attention and MLP read the norm of the residual stream. post: they read the stream, and
    their outputs are normalized before they are added to it (OLMo-2)."""
    qk_norm: Literal["none", "head", "full"] | None = Field(default=None, examples=["head"])
    """RMSNorm of queries and keys. head: of every head by itself (Qwen3). full: of all heads
    together (OLMo-2)."""
    positions: Literal["rope", "learned"] | None = Field(default=None, examples=["learned"])
    """rope: queries and keys are rotated. learned: a table is added to the embeddings (GPT-2)."""
    max_positions: int | None = Field(default=None, ge=1, le=1 << 24, examples=[1024])
    """Rows of the table of learned positions (tokens), at least data.sequence_length; unused with
    rope."""
    rope_theta: float | None = Field(default=None, gt=0, examples=[10000])
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = Field(
        default=None, examples=[{"type": "linear", "factor": 4.0}]
    )
    """How the rotary position frequencies are stretched; its keys are in a table of their own."""
    partial_rotary_factor: float | None = Field(default=None, gt=0, le=1, examples=[0.75])
    """Share of a head's dimensions that are rotated, the first ones."""
    rope_layers: Pattern | None = Field(
        default=None, min_length=1, examples=[[True, True, True, False]]
    )
    """Whether a layer rotates queries and keys; false: a layer without positions (NoPE, SmolLM3).
    One value for each layer, or a pattern whose length divides num_layers."""
    sliding_window: int | None = Field(default=None, ge=1, examples=[4096])
    """A position attends to this many tokens back, itself included (tokens)."""
    window_layers: Pattern | None = Field(
        default=None, min_length=1, examples=[[True, True, True, False]]
    )
    """Whether a layer has the sliding window; a list as rope_layers; null = all layers have it."""
    tie_embeddings: bool | None = Field(default=None, examples=[True])
    """Whether the output head is the transposed token embedding."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] | None = Field(
        default=None, examples=["gelu_tanh"]
    )
    """Nonlinearity of the MLP; gelu_tanh is the approximation of GPT-2 (gelu_new)."""
    gated_mlp: bool | None = Field(default=None, examples=[False])
    """true: down(activation(gate x) * up x), three matrices; with silu this is SwiGLU. false:
    down(activation(up x)), two matrices (GPT-2)."""
    attention_bias: bool | None = Field(default=None, examples=[False])
    """Whether the q, k and v projections have biases."""
    output_bias: bool | None = Field(default=None, examples=[True])
    """Whether the output projection of attention and the matrices of the MLP have biases."""
    initializer_range: float | None = Field(default=None, gt=0, examples=[0.02])
    """Standard deviation of the normal distribution that full weights start from."""
    pad_multiple: int = Field(default=64, ge=1, examples=[64])
    """MLP width and vocabulary are padded with zeros to a multiple of this, which leaves the
    function unchanged and suits tensor cores; 1 = no padding."""

    @field_validator("preset")
    @classmethod
    def _either_preset_or_pretrained(cls, preset: str | None, info: ValidationInfo) -> str | None:
        if "from_pretrained" not in info.data:
            return preset  # it is wrong, and reported
        if info.data["from_pretrained"] is None and preset is None:
            raise PydanticKnownError("missing")
        if info.data["from_pretrained"] is not None and preset is not None:
            raise ValueError("must not be given with model.from_pretrained, which gives the sizes")
        return preset
