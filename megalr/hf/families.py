"""The transformers architectures of a decoder, and its configuration there."""

from __future__ import annotations

from typing import Any

from megalr.errors import UserError
from megalr.models.config import DecoderConfig

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""Activation of a DecoderConfig to transformers' name."""

LAYER_NORM = "LayerNorm"
LEARNED = "learned positions"
UNGATED = "an MLP without a gate"
QKV_BIASES = "biases on q, k, v"
OTHER_BIASES = "biases on o and the MLP"
GROUPED = "fewer key/value heads than heads"
OWN_WIDTH = "heads that are together not as wide as the residual stream"
UNDIVIDED = "a hidden size that is not a multiple of the heads"
HEAD_NORMS = "norms of q and k in each head"
FULL_NORMS = "norms of q and k over all heads"
POST_NORMS = "norms after attention and MLP"
SCALED = "scaled rotary positions"
PARTIAL = "partly rotated heads"
UNROTATED = "layers without positions"
WINDOWS = "sliding windows"
SOME_WINDOWS = "sliding windows in some layers only"

_ANY_ROPE = {GROUPED, OWN_WIDTH, SCALED}
FAMILIES: dict[str, tuple[set[str], set[str]]] = {
    "qwen2": ({QKV_BIASES}, {*_ANY_ROPE, UNDIVIDED, WINDOWS, SOME_WINDOWS}),
    "qwen3": ({HEAD_NORMS}, {*_ANY_ROPE, UNDIVIDED, WINDOWS, SOME_WINDOWS}),
    "olmo2": ({FULL_NORMS, POST_NORMS}, {*_ANY_ROPE, UNDIVIDED}),
    "llama": (set(), {*_ANY_ROPE, QKV_BIASES, OTHER_BIASES}),
    "mistral": (set(), {*_ANY_ROPE, UNDIVIDED, WINDOWS}),
    "smollm3": (set(), {*_ANY_ROPE, UNDIVIDED, WINDOWS, SOME_WINDOWS, UNROTATED}),
    "phi3": (set(), {GROUPED, OWN_WIDTH, UNDIVIDED, WINDOWS, PARTIAL}),
    "gpt2": ({LAYER_NORM, LEARNED, UNGATED, QKV_BIASES, OTHER_BIASES}, set()),
}
"""``model_type`` of the architectures that can be exported, preferred ones first: features beyond
RMSNorm, RoPE and a gated MLP that a decoder must have, and those it may have."""


def features_of(config: DecoderConfig) -> set[str]:
    """What distinguishes the decoder from a plain LLaMA block."""
    windows = {config.window(layer) for layer in range(config.num_layers)}
    rotated = {config.rotates(layer) for layer in range(config.num_layers)}
    rope = config.positions == "rope"
    present = {
        LAYER_NORM: config.norm == "layernorm",
        LEARNED: not rope,
        UNGATED: not config.gated_mlp,
        QKV_BIASES: config.attention_bias,
        OTHER_BIASES: config.output_bias,
        GROUPED: config.kv_heads != config.num_heads,
        OWN_WIDTH: config.q_width != config.hidden_size,
        UNDIVIDED: config.hidden_size % config.num_heads != 0,
        HEAD_NORMS: config.qk_norm == "head",
        FULL_NORMS: config.qk_norm == "full",
        POST_NORMS: config.norm_order == "post",
        SCALED: rope and config.rope_scaling is not None,
        PARTIAL: rope and config.rotary_width != config.head_width,
        UNROTATED: rope and False in rotated,
        WINDOWS: windows != {None},
        SOME_WINDOWS: len(windows) > 1,
    }
    return {feature for feature, here in present.items() if here}


def families_of(config: DecoderConfig) -> tuple[str, ...]:
    """``model_type`` of the architectures that compute the same function, preferred ones first.

    LLaMA's biases on q, k, v include one on o; where the decoder has none it is written as zero.

    Raises:
        UserError: no architecture has this combination.
    """
    features = features_of(config)
    fitting = tuple(
        family
        for family, (needed, allowed) in FAMILIES.items()
        if needed <= features <= needed | allowed
    )
    if OTHER_BIASES in features and QKV_BIASES not in features:
        fitting = ()  # LLaMA has a bias on o only beside those on q, k, v
    if not fitting:
        listed = ", ".join(sorted(features)) or "these sizes"
        raise UserError(
            f"a decoder with {listed} matches none of transformers' architectures "
            f"{', '.join(FAMILIES)}: it cannot be exported"
        )
    return fitting


def transformers_config(
    config: DecoderConfig,
    family: str,
    max_positions: int,
    eos_id: int | None = None,
    pad_id: int | None = None,
    factorized: bool = False,
) -> Any:
    """The ``PretrainedConfig`` of the decoder.

    Args:
        config: the decoder; vocabulary and MLP width exclude padding.
        family: one of :func:`families_of`.
        max_positions: longest trained sequence (tokens).
        eos_id, pad_id: special ids of the tokenizer; None if it has none.
        factorized: take the class of modeling_factorized instead of transformers' own.
    """
    from megalr.hf.modeling_factorized import FACTORIZED, TRANSFORMERS

    config_class: Any = (FACTORIZED if factorized else TRANSFORMERS)[family][0]
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if family == "gpt2":
        return config_class(
            n_embd=config.hidden_size,
            n_inner=config.intermediate_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.position_rows,
            layer_norm_epsilon=config.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            activation_function=ACTIVATIONS[config.activation],
            **common,
        )
    rope = rope_parameters(config)
    common |= {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": max_positions,
        "rope_parameters": dict(rope),
    }
    own_width = config.head_width * config.num_heads != config.hidden_size
    if own_width or family == "qwen3":  # whose default is 128
        common["head_dim"] = config.head_width
    common |= _layer_settings(config, family)
    result: Any = config_class(**common)
    # For readers that do not know rope_parameters. Not setattr: for transformers 5.23 rope_scaling
    # is another name of rope_parameters.
    result.rope_theta = config.rope_theta
    if config.rope_scaling is not None:
        vars(result)["rope_scaling"] = rope
    return result


def rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """Rotary positions under transformers' names: type, theta, scaling, rotated share."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump(exclude_none=True)
        values |= {ROPE_NAMES.get(name, name): value for name, value in scaling.items()}
    if config.partial_rotary_factor != 1:
        values["partial_rotary_factor"] = config.partial_rotary_factor
    return values


ROPE_NAMES = {"type": "rope_type", "original_max_positions": "original_max_position_embeddings"}
"""Keys of section model.rope_scaling that have another name in transformers."""


def _layer_settings(config: DecoderConfig, family: str) -> dict[str, Any]:
    """What one family's configuration says about windows, positions and biases of layers."""
    layers = range(config.num_layers)
    if family == "llama":
        return {"attention_bias": config.attention_bias, "mlp_bias": config.output_bias}
    if family in ("mistral", "phi3"):
        return {"sliding_window": config.window(0)}
    if family == "olmo2":
        return {}
    windows = [config.window(layer) is not None for layer in layers]
    settings: dict[str, Any] = {"use_sliding_window": any(windows)}
    if any(windows):
        kinds = {True: "sliding_attention", False: "full_attention"}
        settings["sliding_window"] = config.sliding_window
        settings["layer_types"] = [kinds[window] for window in windows]
    if family == "smollm3":
        settings["no_rope_layers"] = [int(config.rotates(layer)) for layer in layers]
    elif any(windows) and windows == sorted(windows):
        settings["max_window_layers"] = windows.index(True)  # for readers without layer_types
    return settings
