"""Checks of a user's DeepSpeed JSON that DeepSpeed does not make, or makes only once it trains.

DeepSpeed ignores unknown keys outside its pydantic models and takes any type there.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from pydantic import ValidationError

from megalr.config.problems import nearest, printable, shown
from megalr.config.schema import RunConfig
from megalr.engine.config_keys import (
    ACTIVE_BY_PRESENCE,
    AT_LEAST_ONE,
    CHOICES,
    FIXED_KEYS,
    OPTIONAL_KEYS,
    REFUSED_KEYS,
    deepspeed_defaults,
    deepspeed_sections,
)


def lay_over(
    target: dict[str, Any], user: dict[str, Any], config: RunConfig, prefix: str = ""
) -> list[str]:
    """Write the user's values into ``target``, the values that megalr would write.

    Values that ask for nothing (null, "auto", disabled sections, defaults of keys that megalr does
    not use) are passed over. Returns the problems: keys that are unknown or refused, values of the
    wrong type or out of range, values that contradict the run.
    """
    problems = []
    for name, value in user.items():
        key = f"{prefix}{name}"
        if key in REFUSED_KEYS:
            problem = "" if _is_neutral(key, value) else f"not possible here: {REFUSED_KEYS[key]}"
        elif not (name in target or key in FIXED_KEYS or _is_known(key)):
            problem = f"unknown key; {_hint(name, prefix, target)}"
        elif value is None or value == "auto":
            continue
        elif isinstance(target.get(name), dict) or _is_section(key):
            if value is False and f"{key}.enabled" in FIXED_KEYS:
                value = {"enabled": False}
            if isinstance(value, dict):
                target.setdefault(name, {})
                problems += lay_over(target[name], value, config, f"{key}.")
                continue
            problem = "" if value is False else "must be an object with keys of its own"
        elif key in FIXED_KEYS:
            expected = target.get(name, deepspeed_defaults().get(key))
            problem = _contradiction(key, value, expected, config)
        else:
            problem = _value_problem(key, value, target.get(name, deepspeed_defaults().get(key)))
            if not problem:
                target[name] = copy.deepcopy(value)
        if problem:
            problems.append(f"{printable(key)} = {shown(value)}: {problem}")
    return problems


def _is_neutral(key: str, value: Any) -> bool:
    """Whether the value of a refused key asks for nothing."""
    default = deepspeed_defaults().get(key)
    if value is None or value == "auto" or (value is False and default is not True):
        return True
    if not isinstance(value, dict):
        return bool(value == default) and _same_kind(value, default)
    if key in ACTIVE_BY_PRESENCE:
        return False
    enabled = value.get("enabled")
    if enabled is not None:
        return enabled is False
    return all(_is_neutral(f"{key}.{name}", item) for name, item in value.items())


def _is_known(key: str) -> bool:
    return key in OPTIONAL_KEYS or key in deepspeed_defaults()


def _is_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in deepspeed_defaults())


def _value_problem(key: str, value: Any, example: Any) -> str:
    """Why a value cannot be passed on; "" if it can, as far as is seen without its model."""
    if key in CHOICES:
        return "" if value in CHOICES[key] else f"must be {' or '.join(CHOICES[key])}"
    if example is not None and not _same_kind(value, example):
        return f"must be like {shown(example)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key == "steps_per_print" and value == math.inf:
            return ""
        if abs(value) >= 2**63 or value != value:  # NaN
            return "must be a number below 2^63"
        if key in AT_LEAST_ONE and value < 1:
            return "must be at least 1"
    return ""


def _same_kind(value: Any, example: Any) -> bool:
    if isinstance(value, bool) or isinstance(example, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int | float):
        return isinstance(value, int | float)
    return isinstance(value, str if isinstance(example, str) else type(example))


def _hint(name: str, prefix: str, target: dict[str, Any]) -> str:
    known = {key.removeprefix(prefix) for key in deepspeed_defaults() if key.startswith(prefix)}
    known |= {*target, *(OPTIONAL_KEYS if not prefix else ())}
    known = {key for key in known if "." not in key and f"{prefix}{key}" not in REFUSED_KEYS}
    if not prefix:
        known |= {key for key in REFUSED_KEYS if "." not in key}
    close = nearest(name, known)
    if close:
        return f"did you mean {prefix}{close}?"
    if not prefix:
        return "DeepSpeed would silently ignore it"
    return f"known: {', '.join(sorted(known))}"


def _contradiction(key: str, value: Any, expected: Any, config: RunConfig) -> str:
    if value == expected and _same_kind(value, expected):
        return ""
    run_key = FIXED_KEYS[key]
    if not run_key:
        return f"megalr relies on {shown(expected)}; leave the key out"
    section, name = run_key.split(".")
    given = getattr(getattr(config, section), name)
    follows = f"{run_key} = {given}" if given is not None else f"{run_key}, computed"
    return f"the run asks for {shown(expected)} ({follows}); write 'auto' here"


def model_problems(resolved: dict[str, Any]) -> list[str]:
    """Errors that DeepSpeed's own models find in the completed sections."""
    problems = []
    for section, model in deepspeed_sections().items():
        try:
            model(**resolved.get(section, {}))
        except ValidationError as error:
            for detail in error.errors():
                key = ".".join([section, *map(str, detail["loc"])])
                text = detail["msg"].replace("Input should be", "must be")
                text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
                problems.append(f"{printable(key)} = {shown(detail['input'])}: {text}")
    return problems


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
