"""The transformers architecture and configuration of a decoder."""

from __future__ import annotations

from typing import Any

from megalr.errors import UserError
from megalr.models.config import DecoderConfig

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Activation of a DecoderConfig to transformers' name."""

EXPORTED = ("llama", "mistral", "qwen2", "gpt2")
"""``model_type`` of the architectures that can be exported."""


def families_of(config: DecoderConfig) -> tuple[str, ...]:
    """``model_type`` of the architectures that compute the same function, preferred ones first.

    Raises:
        UserError: no architecture has this combination.
    """
    llama_block = config.norm == "rms" and config.positions == "rope" and config.gated_mlp
    biases = config.attention_bias, config.output_bias
    if llama_block and biases == (False, False):
        return ("llama",) if config.sliding_window is None else ("mistral",)
    if llama_block and biases == (True, False):
        # LLaMA's attention biases include one on o; it is written as zero.
        return ("qwen2", "llama") if config.sliding_window is None else ("qwen2",)
    if llama_block and biases == (True, True) and config.sliding_window is None:
        return ("llama",)
    gpt2_block = config.norm == "layer" and config.positions == "learned" and not config.gated_mlp
    plain_attention = config.kv_heads == config.num_heads and config.sliding_window is None
    if gpt2_block and biases == (True, True) and plain_attention:
        return ("gpt2",)
    raise UserError(
        f"a decoder with norm {config.norm}, positions {config.positions}, gated_mlp "
        f"{config.gated_mlp}, attention_bias {config.attention_bias}, output_bias "
        f"{config.output_bias}, num_kv_heads {config.kv_heads} and sliding_window "
        f"{config.sliding_window} matches none of transformers' architectures "
        f"{', '.join(EXPORTED)}: it cannot be exported"
    )


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
            n_positions=config.max_positions,
            layer_norm_epsilon=config.norm_eps,
            activation_function=ACTIVATIONS[config.activation],
            **common,
        )
    common |= {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": max_positions,
        # transformers 5 turns it into rope_parameters; version 4 reads it as it is.
        "rope_theta": config.rope_theta,
    }
    if family == "mistral":
        result: Any = config_class(sliding_window=config.sliding_window, **common)
    elif family == "qwen2":
        window: dict[str, Any] = {}
        if config.sliding_window is not None:  # in all layers, from the first on
            window = {"sliding_window": config.sliding_window, "max_window_layers": 0}
        result = config_class(use_sliding_window=bool(window), **window, **common)
    else:
        common |= {"attention_bias": config.attention_bias, "mlp_bias": config.output_bias}
        result = config_class(**common)
    result.rope_theta = config.rope_theta  # for readers that do not know rope_parameters
    return result
