"""What can be wrong with a user's DeepSpeed JSON, besides not being JSON."""

from __future__ import annotations

import copy
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megalr.config.problems import nearest, shown
from megalr.config.schema import RunConfig
from megalr.engine.config_keys import FIXED_KEYS, OPTIONAL_KEYS, REFUSED_KEYS

_MODEL_SECTIONS = ("zero_optimization", "bf16", "fp16")
"""Sections that DeepSpeed reads into strict pydantic models; these find misspelt keys."""


def lay_over(
    target: dict[str, Any], user: dict[str, Any], config: RunConfig, prefix: str = ""
) -> list[str]:
    """Write the user's values into ``target``, the values that megalr would write.

    Returns what is wrong: keys that are unknown or refused, and values that contradict the run.
    """
    problems = []
    for name, value in user.items():
        key = f"{prefix}{name}"
        if key in REFUSED_KEYS:
            problems.append(f"{key} = {shown(value)}: not possible here: {REFUSED_KEYS[key]}")
        elif isinstance(target.get(name), dict):
            if isinstance(value, dict):
                problems += lay_over(target[name], value, config, f"{key}.")
            elif value != "auto":
                problems.append(f"{key} = {shown(value)}: must be an object with keys of its own")
        elif name in target and value == "auto":
            continue
        elif key in FIXED_KEYS:
            problems += _contradiction(key, value, target.get(name), config)
        elif _contains_auto(value):
            problems.append(f"{key} = {shown(value)}: 'auto' has no meaning here; give a value")
        elif key in OPTIONAL_KEYS or prefix.startswith(tuple(f"{s}." for s in _MODEL_SECTIONS)):
            target[name] = copy.deepcopy(value)  # judged by nested_problems
        elif name not in target:
            problems.append(f"{key} = {shown(value)}: unknown key; {_hint(name, prefix, target)}")
        elif not _same_kind(value, target[name]):
            problems.append(f"{key} = {shown(value)}: must be like {shown(target[name])}")
        else:
            target[name] = value
    return problems


def _contains_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_contains_auto(item) for item in value.values())
    return value == "auto"


def _same_kind(value: Any, example: Any) -> bool:
    if isinstance(value, bool) or isinstance(example, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(example))


def _hint(name: str, prefix: str, target: dict[str, Any]) -> str:
    known = set(target)
    if not prefix:
        known |= {key for key in (*OPTIONAL_KEYS, *REFUSED_KEYS) if "." not in key}
    close = nearest(name, known)
    if close:
        return f"did you mean {prefix}{close}?"
    if not prefix:
        return "DeepSpeed would ignore it in silence"
    return f"known: {', '.join(sorted(known))}"


def _contradiction(key: str, value: Any, expected: Any, config: RunConfig) -> list[str]:
    if value == expected:
        return []
    run_key = FIXED_KEYS[key]
    if not run_key:
        wanted = "its absence" if expected is None else shown(expected)
        return [f"{key} = {shown(value)}: megalr relies on {wanted}; leave the key out"]
    section, name = run_key.split(".")
    given = getattr(getattr(config, section), name)
    follows = f"{run_key} = {given}" if given is not None else f"{run_key}, computed"
    return [
        f"{key} = {shown(value)}: the run asks for {shown(expected)} ({follows}); write 'auto' here"
    ]


def nested_problems(user: dict[str, Any]) -> list[str]:
    """Misspelt keys and wrong values below the top level, found by DeepSpeed's own models."""
    problems = []
    for section, known in OPTIONAL_KEYS.items():
        values = user.get(section)
        if isinstance(values, dict):
            for name in set(values) - set(known):
                hint = _hint(name, f"{section}.", dict.fromkeys(known))
                problems.append(f"{section}.{name} = {shown(values[name])}: unknown key; {hint}")
        elif known and values is not None:
            problems.append(f"{section} = {shown(values)}: must be an object with keys of its own")
    if any(isinstance(user.get(section), dict) for section in _MODEL_SECTIONS):
        problems += _model_problems(user)
    return problems


def _model_problems(user: dict[str, Any]) -> list[str]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    problems = []
    for section, model in models.items():
        values = user.get(section)
        if not isinstance(values, dict):
            continue
        try:
            model(**_unjudged(values, f"{section}."))
        except ValidationError as error:
            problems += [_describe(section, detail, model) for detail in error.errors()]
    return problems


def _unjudged(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values that nobody has spoken about yet: no refused or fixed keys, no "auto"."""
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        settled = key in REFUSED_KEYS or key in FIXED_KEYS or key == "zero_optimization.stage"
        if not settled and value != "auto":
            kept[name] = _unjudged(value, f"{key}.") if isinstance(value, dict) else value
    return kept


def _describe(section: str, detail: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join([section, *path])
    if detail["type"] == "extra_forbidden":
        names = {info.alias or name: None for name, info in _fields(model, path[:-1]).items()}
        names = {name: None for name in names if f"{section}.{name}" not in REFUSED_KEYS}
        hint = _hint(path[-1], f"{'.'.join([section, *path[:-1]])}.", names)
        return f"{key} = {shown(detail['input'])}: unknown key; {hint}"
    text = detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{key} = {shown(detail['input'])}: {text}"


def _fields(model: type[BaseModel], path: list[str]) -> dict[str, Any]:
    """The fields of the section at ``path`` below ``model``; optional sections are looked into."""
    fields: dict[str, Any] = dict(model.model_fields)
    for name in path:
        annotation = fields[name].annotation
        sections = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        fields = dict(sections[0].model_fields) if sections else {}
    return fields


def combination_problems(config: RunConfig, resolved: dict[str, Any]) -> list[str]:
    """Values that DeepSpeed or megalr cannot do together (table in docs/dev/deepspeed-notes.md)."""
    problems = []
    precision, zero = config.train.precision, resolved["zero_optimization"]
    stage = zero["stage"]
    accumulate = resolved["data_types"]["grad_accum_dtype"]
    allowed = {"fp32": ("fp32",), "paper_bf16": ("bf16",)}.get(
        precision, ("bf16",) if stage == 0 else ("fp32", "bf16")
    )
    if accumulate not in allowed:
        problems.append(
            f"data_types.grad_accum_dtype = {shown(accumulate)}: must be {' or '.join(allowed)} "
            f"with train.precision = {precision} and zero_optimization.stage = {stage}"
        )
    if resolved["communication_data_type"] not in ("fp32", "bf16"):
        problems.append(
            f"communication_data_type = {shown(resolved['communication_data_type'])}: "
            "must be fp32 or bf16"
        )
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "none":
            continue
        if device != "cpu":
            problems.append(f"zero_optimization.{name}.device = {shown(device)}: must be cpu")
        elif stage not in stages:
            problems.append(
                f"zero_optimization.{name}: needs ZeRO stage "
                f"{' or '.join(map(str, stages))}, not {stage}"
            )
        elif precision == "paper_bf16":
            problems.append(
                f"zero_optimization.{name}: train.precision = paper_bf16 cannot be offloaded; "
                "DeepSpeed asks for its own CPU optimizer there"
            )
    return problems
