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


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """The integer; one beyond all floats is infinite, as a float of that size is."""
    text = loader.construct_scalar(node).replace("_", "")
    value = int(text, 16) if text.lower().lstrip("+-").startswith("0x") else int(text)
    if abs(value) < 10**300:
        return value
    return math.inf if value > 0 else -math.inf


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
MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Values in a text once its aliases are expanded; a list of aliases of lists of aliases multiplies
them."""


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
        yield value, "must be below 2^63"
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
            _count(node, {}, label)
            return source, _construct(node, key, label, source)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, error.problem
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{label}: not valid YAML: {where}{what}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError(f"{label}: not a configuration: nested too deeply") from error
    return source, None


def _count(node: yaml.Node, counts: dict[int, int], label: str, depth: int = 0) -> int:
    """Values below a node, itself included, with aliases expanded.

    ``counts`` holds the nodes that were seen, 0 for those that are not finished.

    Raises UserError when that are too many, or nested too deeply, or without end.
    """
    if counts.get(id(node)) == 0:
        raise UserError(f"{label}: not a configuration: an alias contains itself")
    if depth > MAX_DEPTH:
        raise UserError(f"{label}: not a configuration: nested more than {MAX_DEPTH} deep")
    if id(node) not in counts:
        counts[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total = 1 + sum(_count(child, counts, label, depth + 1) for child in children)
        if total > MAX_VALUES:
            raise UserError(f"{label}: not a configuration: more than {MAX_VALUES} values")
        counts[id(node)] = total
    return counts[id(node)]


def read_text(path: Path, what: str) -> str:
    """The text of a file of at most ``MAX_BYTES``.

    Raises UserError, with ``what`` the file is, when it cannot be read, is larger or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read {what}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r}: cannot read {what}: {error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: this is not {what}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_file(path: Path) -> Source:
    """Read one YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises UserError when the file cannot be read or is not such YAML.
    """
    source, value = _parse(read_text(path, "the configuration"), "", str(path))
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
