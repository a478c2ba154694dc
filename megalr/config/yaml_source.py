"""YAML text to nested dictionaries that remember where every value was written.

YAML 1.2 scalars: PyYAML implements 1.1, where ``1e-3`` is a string, ``no`` a boolean, ``010`` eight
and ``1:30`` ninety.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from megalr.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema; ints may be written 10_000."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.lower().lstrip("+-").startswith("0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower().replace("_", "")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


COMMAND_LINE = "command line"
LARGEST_FLOAT = 3.4e38


@dataclass
class Source:
    """The values of one source and where they stand.

    ``values`` is the nested dictionary; ``places`` maps each dotted key that holds no dictionary to
    its place ("recipe.yaml:12" or "command line"); ``problems`` lists what is wrong with the text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _construct(node: yaml.Node, key: str, label: str, source: Source) -> Any:
    """The Python value of a node; dictionaries are followed, everything else is a leaf."""
    place = f"{label}:{node.start_mark.line + 1}" if label != COMMAND_LINE else label
    if not isinstance(node, yaml.MappingNode):
        source.places[key] = place
        value = _plain(node)
        source.problems += [
            f"{place}: {key} = {number:.5g}: {allowed}" for number, allowed in _wrong_numbers(value)
        ]
        return value
    if node.tag != "tag:yaml.org,2002:map":
        raise yaml.constructor.ConstructorError(
            problem=f"unknown tag {node.tag!r}", problem_mark=node.start_mark
        )
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name_node, value_node in node.value:
        name, line = str(_plain(name_node)), name_node.start_mark.line + 1
        dotted = f"{key}.{name}" if key else name
        if name in values:
            source.problems.append(
                f"{label}:{line}: {dotted} is given twice in this file, first in line {lines[name]}"
            )
            continue
        lines[name] = line
        values[name] = _construct(value_node, dotted, label, source)
    return values


def _wrong_numbers(value: Any) -> Iterator[tuple[float, str]]:
    """Numbers, also inside lists, that no tensor holds, and what is allowed."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _wrong_numbers(item)
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield math.copysign(math.inf, value) if abs(value) > 1e300 else value, "must be below 2^63"
    elif isinstance(value, float) and not math.isfinite(value):
        yield value, "must be a finite number"
    elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        yield value, f"must be at most {LARGEST_FLOAT:g}, the largest number in float32"


def _plain(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _parse(text: str, key: str, label: str) -> tuple[Source, Any]:
    """The source of one YAML text that stands at ``key``, and its value (None when it is empty)."""
    source = Source()
    try:
        node = _compose(text)
        if node is not None:
            return source, _construct(node, key, label, source)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, error.problem
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{label}: not valid YAML: {where}{what}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError(f"{label}: not a configuration: an alias contains itself") from error
    return source, None


def read_file(path: Path) -> Source:
    """Read one YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises UserError when the file cannot be read or is not such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    source, value = _parse(text, "", str(path))
    if not isinstance(value, dict | NoneType):
        raise UserError(
            f"{path}: {value!r:.60}: must hold sections such as `train:` with keys below"
        )
    source.values = value or {}
    return source


def read_override(text: str) -> tuple[str, Source]:
    """Read ``section.key=value``; the value is YAML. Returns the dotted key and its source.

    Raises UserError when there is no ``=`` or the value is not valid YAML.
    """
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        raise UserError(f"{COMMAND_LINE}: {text!r}: must have the form section.key=value")
    try:
        source, value = _parse(value_text, key, COMMAND_LINE)
    except UserError as error:
        raise UserError(f"{error} (in {text!r})") from error
    if value is None:
        source.places[key] = COMMAND_LINE
    for name in reversed(key.split(".")):
        value = {name: value}
    source.values = value
    return key, source
