"""config.json of a transformers folder: typed, limited, and resolved by transformers itself.

The file's own fields are checked first, so that no absurd size reaches transformers. What they mean
is then left to transformers' configuration class: defaults, windows by layer, RoPE parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalr.errors import UserError
from megalr.files import read_json_object

IMPORTED = ("llama", "mistral", "qwen2")
"""``model_type`` of the architectures that can be imported."""

CONFIG_NAME = "config.json"
Width = Annotated[int, Field(ge=1, le=1 << 22)]
Count = Annotated[int, Field(ge=1, le=1 << 14)]


class PretrainedConfig(BaseModel):
    """The fields that decide a model's function, with their types and limits; others are kept."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model_type: Annotated[str, Field(max_length=100)] | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Annotated[int, Field(ge=2, le=1 << 25)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    rope_theta: Annotated[float, Field(gt=1, le=1e15, allow_inf_nan=False)] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_act: Annotated[str, Field(max_length=100)] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    layer_types: list[Annotated[str, Field(max_length=100)]] | None = None


REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
)
"""Fields that have a value in every configuration that transformers has resolved."""


def load_config(folder: Path) -> Any:
    """transformers' configuration of the model in a folder, types and limits checked.

    Code that the folder may bring along is never run.

    Raises:
        UserError: no such folder, an architecture that cannot be imported (those that can are
            named), or values that no model can have.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(
            f"{path}: No such file or directory; give a folder with a model of transformers"
        )
    raw = read_json_object(path)
    kind = raw.get("model_type")
    if kind not in IMPORTED:
        own_code = " (it needs the folder's own code, which is not run)" * ("auto_map" in raw)
        raise UserError(
            f"{folder}: architecture {repr(kind)[:60]} cannot be read{own_code}; those that work: "
            f"{', '.join(IMPORTED)}"
        )
    _check_types(path, raw)
    from transformers import AutoConfig

    try:
        hf: Any = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises nearly anything for a bad configuration
        raise UserError(
            f"{path}: transformers cannot read it ({first_line(error)}); copy the folder again"
        ) from error
    fields = {name: getattr(hf, name, None) for name in PretrainedConfig.model_fields}
    _check_types(path, fields)
    absent = [name for name in REQUIRED if fields[name] is None]
    if absent:
        raise UserError(f"{path}: gives no {absent[0]}; copy the folder again")
    return hf


def pretrained_sizes(folder: Path) -> dict[str, Any]:
    """The values of section ``model`` for the model in a transformers folder.

    Raises:
        UserError: as :func:`load_config`, or a variant that the decoder does not compute.
    """
    hf = load_config(folder)
    problems = list(_unsupported(folder, hf))
    if problems:
        raise UserError(
            f"{folder}: a {hf.model_type} model with {', '.join(problems)} cannot be read: only "
            "the plain architecture is"
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
        "sliding_window": hf.sliding_window if "sliding" in _attention_kinds(hf) else None,
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "attention_bias": hf.model_type == "qwen2",
    }


def first_line(error: Exception) -> str:
    """The first sentence of an error's text in one line, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:300].rstrip(".")


def _check_types(path: Path, values: dict[str, Any]) -> None:
    try:
        PretrainedConfig.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(map(str, detail["loc"]))
        reason = detail["msg"][0].lower() + detail["msg"][1:]
        raise UserError(
            f"{path}: {name} is {_shown(detail['input'])}: {reason}; copy the folder again"
        ) from None


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.isidentifier():
        text = value
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an integer of thousands of digits
            text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rope(hf: Any) -> dict[str, Any]:
    """rope_type, rope_theta and whatever modifies them, of transformers 5 and 4."""
    if getattr(hf, "rope_parameters", None):
        return dict(hf.rope_parameters)
    scaling = getattr(hf, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_type": kind, "rope_theta": getattr(hf, "rope_theta", None)}


def _attention_kinds(hf: Any) -> set[str]:
    """``full`` and ``sliding``: the kinds of attention that transformers' layers compute."""
    if hf.model_type == "llama":
        return {"full"}  # its layers have no window, whatever the configuration says
    if hf.model_type == "mistral":
        return {"full" if hf.sliding_window is None else "sliding"}
    return {kind.removesuffix("_attention") for kind in hf.layer_types}


def _unsupported(folder: Path, hf: Any) -> Iterator[str]:
    """Features of the configuration that the decoder does not have."""
    if hf.hidden_act != "silu":
        yield f"hidden_act {_shown(hf.hidden_act)}"
    yield from _unsupported_rope(hf)
    if hf.hidden_size % hf.num_attention_heads:
        yield f"hidden_size {hf.hidden_size} not a multiple of {hf.num_attention_heads} heads"
    width = hf.hidden_size // hf.num_attention_heads
    if (getattr(hf, "head_dim", None) or width) != width:
        yield f"head_dim {hf.head_dim} other than {width}"
    elif width % 2:
        yield f"an odd head_dim, {width}"
    if hf.num_attention_heads % (hf.num_key_value_heads or hf.num_attention_heads):
        yield f"{hf.num_attention_heads} heads on {hf.num_key_value_heads} key/value heads"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            yield name
    kinds = _attention_kinds(hf)
    if len(kinds) > 1:
        yield "sliding windows in some layers only"
    elif kinds - {"full", "sliding"} or (kinds == {"sliding"} and hf.sliding_window is None):
        yield f"layer_types {_shown(hf.layer_types[0])}"
    if hf.model_type == "qwen2" and len(hf.layer_types) != hf.num_hidden_layers:
        yield f"{len(hf.layer_types)} layer_types for {hf.num_hidden_layers} layers"
    if getattr(hf, "quantization_config", None) is not None:
        yield "quantized weights"
    if (folder / "adapter_config.json").exists():
        yield "an adapter (adapter_config.json; merge it into the weights first)"


def _unsupported_rope(hf: Any) -> Iterator[str]:
    rope = _rope(hf)
    partial = rope.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None))
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    if kind != "default":
        yield f"rope_type {_shown(kind)}"
    elif partial not in (None, 1):
        yield f"partial_rotary_factor {_shown(partial)}"
    elif not isinstance(theta, int | float) or isinstance(theta, bool) or not 1 < theta <= 1e15:
        yield f"rope_theta {_shown(theta)}"
