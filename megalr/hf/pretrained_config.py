"""config.json of a transformers folder: typed, limited, and resolved by transformers itself.

The file's own fields are checked first, so that no absurd size reaches transformers. What they mean
is then left to transformers' configuration class: defaults, windows by layer, RoPE parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalr.errors import UserError
from megalr.files import read_json_object
from megalr.hf.supported import (
    GPT2_ACTIVATIONS,
    IMPORTED,
    SLIDING,
    foreign_features,
    head_width_of,
    layer_kinds,
    rope_of,
    rotated_layers,
    scaling_of,
    short_repr,
    shortest_pattern,
    unsupported,
)

FACTORIZED_PREFIX = "megalr_"
"""``model_type`` of a factorized export is this and that of its family."""

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
    no_rope_layers: Annotated[list[int], Field(max_length=1 << 14)] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    n_embd: Width | None = None
    n_inner: Width | None = None
    n_layer: Count | None = None
    n_head: Count | None = None
    n_positions: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    activation_function: Annotated[str, Field(max_length=100)] | None = None


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
REQUIRED = (*_SIZES, "intermediate_size", "rms_norm_eps")
REQUIRED_GPT2 = (*_SIZES, "n_positions", "layer_norm_epsilon", "activation_function")
"""Fields that have a value in every configuration that transformers has resolved."""


def load_config(folder: Path) -> Any:
    """As :func:`config_as_stored`; of a factorized model the configuration of its dense family."""
    from megalr.hf.modeling_factorized import TRANSFORMERS

    hf = config_as_stored(folder)
    if not hf.model_type.startswith(FACTORIZED_PREFIX):
        return hf
    own = ("model_type", "architectures", "auto_map", "transformers_version", "factorization")
    config_class: Any = TRANSFORMERS[hf.model_type.removeprefix(FACTORIZED_PREFIX)][0]
    return config_class(**{key: value for key, value in hf.to_dict().items() if key not in own})


def config_as_stored(folder: Path) -> Any:
    """transformers' configuration of the model in a folder, types and limits checked.

    Code that the folder may bring along is never run.

    Raises:
        UserError: no such folder, an architecture that cannot be imported (those that can are
            named), values that no model can have, or factors that are no product of two matrices.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(
            f"{path}: No such file or directory; give a folder with a model of transformers"
        )
    raw = read_json_object(path)
    stored = raw.get("model_type")
    kind = stored.removeprefix(FACTORIZED_PREFIX) if isinstance(stored, str) else stored
    if kind not in IMPORTED:
        own_code = " (it needs the folder's own code, which is not run)" * ("auto_map" in raw)
        raise UserError(
            f"{folder}: architecture {repr(stored)[:60]}{foreign_features(raw)} cannot be read"
            f"{own_code}; those that work: {', '.join(IMPORTED)}"
        )
    check_field_types(path, raw)
    from transformers import AutoConfig

    import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)

    try:
        hf: Any = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises nearly anything for a bad configuration
        raise UserError(
            f"{path}: transformers cannot read it ({first_line(error)}); copy the folder again"
        ) from error
    if kind != stored:
        _check_product(folder, hf)
    fields = {name: getattr(hf, name, None) for name in PretrainedConfig.model_fields}
    check_field_types(path, fields)
    required = REQUIRED_GPT2 if kind == "gpt2" else REQUIRED
    absent = [name for name in required if fields[name] is None]
    if absent:
        raise UserError(f"{path}: gives no {absent[0]}; copy the folder again")
    return hf


def _check_product(folder: Path, hf: Any) -> None:
    """Raise UserError unless the matrices of a factorized folder are products of two factors."""
    from megalr.hf.modeling_factorized import check_config

    try:
        form = check_config(hf)["form"]
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    form = "GPT-2" if hf.model_type == f"{FACTORIZED_PREFIX}gpt2" else f"form {form}"
    if form != "form product":
        raise UserError(
            f"{folder}: a factorized export of {form} cannot be read, only products of two "
            "factors: start from a dense model, for example the run's export with --form dense"
        )


def pretrained_sizes(folder: Path) -> dict[str, Any]:
    """The values of section ``model`` for the model in a transformers folder.

    Raises:
        UserError: as :func:`load_config`, or a variant that the decoder does not compute.
    """
    hf = load_config(folder)
    problems = list(unsupported(folder, hf))
    if problems:
        listed = ", ".join(problems)
        raise UserError(f"{folder}: a {hf.model_type} model with {listed} cannot be read")
    if hf.model_type == "gpt2":
        return _gpt2_sizes(hf)
    rope = rope_of(hf)
    windows = [kind == SLIDING for kind in layer_kinds(hf)]
    return {
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_width_of(hf),
        "vocab_size": hf.vocab_size,
        "norm": "rmsnorm",
        "norm_eps": float(hf.rms_norm_eps),
        "norm_order": "post" if hf.model_type == "olmo2" else "pre",
        "qk_norm": {"qwen3": "head", "olmo2": "full"}.get(hf.model_type, "none"),
        "positions": "rope",
        "max_positions": None,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling_of(hf),
        "partial_rotary_factor": float(rope.get("partial_rotary_factor") or 1),
        "rope_layers": shortest_pattern(rotated_layers(hf)),
        "sliding_window": hf.sliding_window if any(windows) else None,
        "window_layers": shortest_pattern(windows) if any(windows) else None,
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": hf.model_type == "qwen2",
        "output_bias": False,
    }


def _gpt2_sizes(hf: Any) -> dict[str, Any]:
    """The values of section ``model`` for a GPT-2."""
    return {
        "hidden_size": hf.n_embd,
        "intermediate_size": hf.n_inner or 4 * hf.n_embd,
        "num_layers": hf.n_layer,
        "num_heads": hf.n_head,
        "num_kv_heads": hf.n_head,
        "head_dim": hf.n_embd // hf.n_head,
        "vocab_size": hf.vocab_size,
        "norm": "layernorm",
        "norm_eps": float(hf.layer_norm_epsilon),
        "norm_order": "pre",
        "qk_norm": "none",
        "positions": "learned",
        "max_positions": hf.n_positions,
        "activation": GPT2_ACTIVATIONS[hf.activation_function],
        "gated_mlp": False,
        "attention_bias": True,
        "output_bias": True,
        "tie_embeddings": bool(hf.tie_word_embeddings),
        **dict.fromkeys(("rope_scaling", "rope_layers", "sliding_window", "window_layers")),
    }


def first_line(error: Exception) -> str:
    """The first sentence of an error's text in one line, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:300].rstrip(".")


def check_field_types(path: Path, values: dict[str, Any]) -> None:
    """Raise UserError for a field of config.json, ``path``, with a type or size no model has."""
    try:
        PretrainedConfig.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(map(str, detail["loc"]))
        reason = detail["msg"][0].lower() + detail["msg"][1:]
        raise UserError(
            f"{path}: {name} is {short_repr(detail['input'])}: {reason}; copy the folder again"
        ) from None
