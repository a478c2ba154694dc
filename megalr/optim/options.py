"""Options of the optimizers: names, defaults and limits as the configuration's schema states them.

An optimizer names the sections of :mod:`megalr.config` that declare its options; the same classes
check a run's YAML and the arguments of an optimizer that is constructed directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megalr.config.base import Section
from megalr.config.optimizers import AdamSection
from megalr.errors import UserError

DEFAULT_LR = 1e-3
NOT_OPTIONS = ("name", "targets", "lr_ratio", "weight_decay_ratio", "stochastic_rounding")
"""Keys of a section that select the rule, its tensors and their groups; the last is AdamW's own."""
CHECKED_ELSEWHERE = {"lr": 1.0, "rank": 1}
"""Options whose limits are not those of the schema, with a value that the schema accepts: the
current learning rate may be 0, and the largest rank depends on the matrix."""


def option_names(section: type[Section]) -> list[str]:
    """The options that a section declares, in its order."""
    return [name for name in section.model_fields if name not in NOT_OPTIONS]


def with_defaults(
    declared: Sequence[type[Section]], marks: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of an optimizer: declared defaults, then ``marks``, then ``given``.

    A later section's default wins: a method's ``eps`` takes the place of the optimizer's.

    Raises:
        TypeError: an option that is not declared.
    """
    options: dict[str, Any] = {}
    for section in declared:
        options |= {name: section.model_fields[name].default for name in option_names(section)}
    options |= {"lr": DEFAULT_LR, **marks}
    unknown = sorted(set(given) - set(options))
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}; known: {', '.join(options)}")
    return {**options, **given}


def check_options(declared: Iterable[type[Section]], options: Mapping[str, Any]) -> None:
    """Check the options against the limits of the sections that declare them.

    Options that are None take their default and are not checked.

    Raises:
        UserError: one line with every option that is out of its limits, and its value.
    """
    if not options["lr"] >= 0:
        raise UserError(f"optimizer.lr must be >= 0, got {options['lr']}")
    problems: list[str] = []
    checked: set[str] = set()
    for section in reversed(list(declared)):  # of an option declared twice the later limits count
        names = [name for name in option_names(section) if name not in checked]
        checked.update(names)
        values = {name: options[name] for name in names if options.get(name) is not None}
        own = {k: v for k, v in CHECKED_ELSEWHERE.items() if k in section.model_fields}
        try:
            section.model_validate({**values, **own})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                name = str(detail["loc"][0])
                prefix = "optimizer" if issubclass(section, AdamSection) else "method"
                text = _requirement(detail["type"], detail["msg"], section.model_fields[name])
                problems.append(f"{prefix}.{name} {text}, got {values[name]!r}")
    if problems:
        raise UserError("; ".join(problems))


def _requirement(kind: str, message: str, field: FieldInfo) -> str:
    """What a value must be, for one error of pydantic about ``field``."""
    if kind == "literal_error":
        return f"must be one of {', '.join(map(str, get_args(field.annotation)))}"
    if kind.startswith(("greater_than", "less_than")):
        return f"must be {_limits(field)}"
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _limits(field: FieldInfo) -> str:
    """The range of a number, "in [0, 1)" or ">= 1 update"."""
    low = high = ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f"[{limit.ge}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"({limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            high = f"{limit.le}]"
        elif isinstance(limit, annotated_types.Lt):
            high = f"{limit.lt})"
    if low and high:
        return f"in {low}, {high}"
    # Meanings of counts begin with their unit.
    unit = " update" if (field.description or "").startswith("Updates") else ""
    return f"{'>=' if low[0] == '[' else '>'} {low[1:]}{unit}"
