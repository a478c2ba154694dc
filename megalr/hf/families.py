"""The mapping between decoders and transformers architectures, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.models.config import DecoderConfig

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Activation of a DecoderConfig to transformers' name."""

EXPORTED = ("llama", "mistral", "qwen2", "gpt2")
IMPORTED = ("llama", "mistral", "qwen2")
"""``model_type`` of the architectures that can be exported and imported."""


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
) -> Any:
    """The ``PretrainedConfig`` of the decoder.

    Args:
        config: the decoder; vocabulary and MLP width exclude padding.
        family: one of :func:`families_of`.
        max_positions: longest trained sequence (tokens).
        eos_id, pad_id: special ids of the tokenizer; None if it has none.
    """
    import transformers

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if family == "gpt2":
        return transformers.GPT2Config(
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
        result: Any = transformers.MistralConfig(sliding_window=config.sliding_window, **common)
    elif family == "qwen2":
        window: dict[str, Any] = {}
        if config.sliding_window is not None:  # in all layers, from the first on
            window = {"sliding_window": config.sliding_window, "max_window_layers": 0}
        result = transformers.Qwen2Config(use_sliding_window=bool(window), **window, **common)
    else:
        common |= {"attention_bias": config.attention_bias, "mlp_bias": config.output_bias}
        result = transformers.LlamaConfig(**common)
    result.rope_theta = config.rope_theta  # for readers that do not know rope_parameters
    return result


def pretrained_sizes(folder: Path) -> dict[str, Any]:
    """The values of section ``model`` of the model in a transformers folder.

    Raises:
        UserError: no such folder, an unknown architecture (those that work are named), or a variant
            that the decoder does not compute.
    """
    kind = _read_config(folder).get("model_type")
    if kind not in IMPORTED:
        raise UserError(
            f"{folder}: architecture {kind!r} cannot be read; those that work: "
            f"{', '.join(IMPORTED)}"
        )
    from transformers import AutoConfig

    try:
        hf: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises nearly anything for a bad configuration
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{folder}/config.json: transformers cannot read it ({reason})") from error
    problems = list(_unsupported(hf))
    if problems:
        raise UserError(
            f"{folder}: a {kind} model with {', '.join(problems)} cannot be read: only the plain "
            "architecture is"
        )
    return {
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "vocab_size": hf.vocab_size,
        "norm_eps": float(hf.rms_norm_eps),
        "rope_theta": float(_rope(hf)["rope_theta"]),
        "sliding_window": _window(hf),
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "attention_bias": kind == "qwen2",
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give a folder with a model of transformers"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no object; copy the folder again")
    return content


def _rope(hf: Any) -> dict[str, Any]:
    """rope_type and rope_theta, of transformers 5 and 4."""
    if getattr(hf, "rope_parameters", None):
        return dict(hf.rope_parameters)
    scaling = getattr(hf, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_type": kind, "rope_theta": hf.rope_theta}


def _window(hf: Any) -> int | None:
    """The sliding window of all layers, None if there is none."""
    if hf.model_type == "llama" or not getattr(hf, "use_sliding_window", True):
        return None
    return hf.sliding_window


def _unsupported(hf: Any) -> Iterator[str]:
    """What the architecture offers and the decoder does not have."""
    if hf.hidden_act != "silu":
        yield f"hidden_act {hf.hidden_act}"
    rope = _rope(hf)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        yield f"rope_type {rope.get('rope_type')}"
    width = hf.hidden_size // hf.num_attention_heads
    if (getattr(hf, "head_dim", None) or width) != width:
        yield f"head_dim {hf.head_dim} other than {width}"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            yield name
    if len(set(getattr(hf, "layer_types", None) or ["one"])) > 1:
        yield "sliding windows in some layers only"
    if getattr(hf, "quantization_config", None) is not None:
        yield "quantized weights"
