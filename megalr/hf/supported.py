"""Which features of a transformers configuration the decoder computes; the others by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalr.config.model import SCALING_KEYS, RopeScaling
from megalr.hf.families import ACTIVATIONS, ROPE_NAMES

IMPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gpt2")
"""``model_type`` of the architectures that can be imported."""

FOREIGN = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "soft caps",
    "final_logit_softcapping": "soft caps",
    "kv_lora_rank": "latent attention",
    "mamba_d_state": "state-space layers",
    "state_size": "state-space layers",
    "residual_multiplier": "scaled residual sums",
    "vision_config": "images",
}
"""Features that no decoder here has, by the key of config.json that switches them on."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in ``layer_types``."""


def short_repr(value: Any) -> str:
    """The value of a configuration in at most 60 characters; a word without quotes."""
    if isinstance(value, str) and value.isidentifier():
        text = value
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an integer of thousands of digits
            text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def foreign_features(raw: dict[str, Any]) -> str:
    """Names of features that config.json switches on: " with soft caps (final_logit_softcapping
    30.0)"; "" if there are none."""
    found = {
        feature: f"{feature} ({key} {short_repr(raw[key])})"
        for key, feature in FOREIGN.items()
        if raw.get(key) not in (None, 0, False)
    }
    return f" with {', '.join(found.values())}" if found else ""


def rope_of(hf: Any) -> dict[str, Any]:
    """rope_type, rope_theta and whatever modifies them."""
    return dict(getattr(hf, "rope_parameters", None) or {})


def head_width_of(hf: Any) -> int:
    """Width of a head; 0 if the sizes do not divide."""
    given = getattr(hf, "head_dim", None)
    if given is None and hf.hidden_size % hf.num_attention_heads:
        return 0
    return int(given or hf.hidden_size // hf.num_attention_heads)


def layer_kinds(hf: Any) -> list[str]:
    """Kind of attention of each layer that transformers builds."""
    if hf.model_type in ("llama", "olmo2"):
        # Their layers have no window, whatever the configuration says.
        return [FULL] * hf.num_hidden_layers
    if hf.model_type in ("mistral", "phi3"):
        return [FULL if hf.sliding_window is None else SLIDING] * hf.num_hidden_layers
    return list(hf.layer_types)


def rotated_layers(hf: Any) -> list[bool]:
    """Whether each layer rotates queries and keys."""
    flags = getattr(hf, "no_rope_layers", None) if hf.model_type == "smollm3" else None
    if flags is None:
        return [True] * hf.num_hidden_layers
    return [bool(flag) for flag in flags[: hf.num_hidden_layers]]  # 1: with rotary positions


def shortest_pattern(values: Sequence[bool]) -> tuple[bool, ...] | None:
    """The shortest tuple that gives ``values`` when it is repeated; None if all are True."""
    if all(values):
        return None
    lengths = (n for n in range(1, len(values) + 1) if len(values) % n == 0)
    return next(
        tuple(values[:n]) for n in lengths if list(values) == list(values[:n]) * (len(values) // n)
    )


def scaling_of(hf: Any) -> RopeScaling | None:
    """How the model's rotary positions are stretched.

    Raises:
        ValueError: a kind or values that the decoder does not compute; names them.
    """
    rope = rope_of(hf)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in SCALING_KEYS:
        raise ValueError(f"rope_type {short_repr(kind)}")
    needed, optional = SCALING_KEYS[kind]
    names = {name: ROPE_NAMES.get(name, name) for name in (*needed, *optional)}
    # Zero means the default, as in transformers.
    values = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs)}
    if "truncate" in names and rope.get("truncate") is not None:
        values["truncate"] = rope["truncate"]
    try:
        scaling = RopeScaling.model_validate({"type": kind, **values})
        if kind == "yarn" and scaling.attention_factor is None:
            factor = _mscale_ratio(rope, scaling.factor)
            scaling = RopeScaling.model_validate(
                {"type": kind, **values, "attention_factor": factor}
            )
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = "".join(f"{part} {short_repr(detail['input'])}: " for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        raise ValueError(f"rope_type {kind} ({where}{message[0].lower()}{message[1:]})") from error
    return scaling


def _mscale_ratio(rope: dict[str, Any], factor: float) -> float | None:
    """YaRN's attention factor by mscale and mscale_all_dim; None without both, or not numbers."""
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all(isinstance(scale, int | float) and scale for scale in scales):
        return None
    above, below = (0.1 * float(scale) * math.log(factor) + 1 for scale in scales if scale)
    return above / below


GPT2_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_new": "gelu_tanh",
    "swish": "silu",
}
"""Activations of GPT-2 by transformers' names, of which the first is GPT-2's own."""

GPT2_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Keys of GPT-2's configuration that change its function, with the values that it has here."""


def unsupported(folder: Path, hf: Any) -> Iterator[str]:
    """Features of the configuration that the decoder does not have."""
    if not head_width_of(hf):
        yield f"hidden_size {hf.hidden_size} not a multiple of {hf.num_attention_heads} heads"
    yield from _unsupported_gpt2(hf) if hf.model_type == "gpt2" else _unsupported_llama(hf)
    if getattr(hf, "quantization_config", None) is not None:
        yield "quantized weights"
    if (folder / "adapter_config.json").exists():
        yield "an adapter (adapter_config.json; merge it into the weights first)"


def _unsupported_gpt2(hf: Any) -> Iterator[str]:
    if hf.activation_function not in GPT2_ACTIVATIONS:
        yield f"activation_function {short_repr(hf.activation_function)}"
    for name, ours in GPT2_SWITCHES.items():
        if bool(getattr(hf, name, ours)) != ours:
            yield f"{name} {short_repr(getattr(hf, name))}"


def _unsupported_llama(hf: Any) -> Iterator[str]:
    if hf.hidden_act != "silu":
        yield f"hidden_act {short_repr(hf.hidden_act)}"
    yield from _unsupported_rope(hf)
    if hf.num_attention_heads % (hf.num_key_value_heads or hf.num_attention_heads):
        yield f"{hf.num_attention_heads} heads on {hf.num_key_value_heads} key/value heads"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            yield name
    yield from _unsupported_layers(hf)


def _unsupported_layers(hf: Any) -> Iterator[str]:
    kinds = layer_kinds(hf)
    other = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if other or (SLIDING in kinds and hf.sliding_window is None):
        yield f"layer_types {short_repr((other or [SLIDING])[0])}"
    for name, values in (("layer_types", kinds), ("no_rope_layers", rotated_layers(hf))):
        if len(values) != hf.num_hidden_layers:
            yield f"{len(values)} {name} for {hf.num_hidden_layers} layers"


def _unsupported_rope(hf: Any) -> Iterator[str]:
    rope = rope_of(hf)
    if any(isinstance(value, dict) for value in rope.values()):
        yield "rope_parameters by kind of layer"
        return
    try:
        scaling_of(hf)
    except ValueError as problem:
        yield str(problem)
        return
    theta = rope.get("rope_theta")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 1 < theta <= 1e15:
        yield f"rope_theta {short_repr(theta)}"
    share = rope.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None))
    is_share = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1
    if share not in (None, 1) and (hf.model_type != "phi3" or not is_share):
        yield f"partial_rotary_factor {short_repr(share)}"
    elif (width := int(head_width_of(hf) * (share or 1))) % 2:
        yield f"an odd head_dim, {width}" if share in (None, 1) else f"{width} rotated dimensions"
