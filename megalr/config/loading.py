"""From YAML files and ``section.key=value`` overrides to a checked RunConfig, and back to text.

Every problem of a configuration is reported in one go. Each line says where the value was written,
its dotted key, the value seen, what is allowed and the nearest valid key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megalr.config.checks import cross_problems
from megalr.config.problems import (
    describe,
    dotted_key,
    keys_of_no_member,
    nearest,
    section_classes,
    shown,
)
from megalr.config.schema import RunConfig
from megalr.config.yaml_source import COMMAND_LINE, Source, read_file, read_override
from megalr.errors import UserError


def load_run_config(
    config_files: Sequence[Path | str],
    overrides: Sequence[str] = (),
    presets: Iterable[str] | None = None,
) -> RunConfig:
    """Merge the files in order, apply the overrides, check everything.

    A key may stand in one file only; an override replaces the value of a file and of an earlier
    override, and ``model.from_pretrained`` that of ``model.preset`` and conversely. ``presets`` are
    the known names of models; without them ``model.preset`` is not checked here.

    Raises UserError with one line per problem.
    """
    problems: list[str] = []
    merged = Source()
    for path in config_files:
        _merge_file(merged, _collect(problems, read_file, Path(path)), problems)
    given: dict[str, Source] = {}
    for text in overrides:
        result = _collect(problems, read_override, text)
        if result is not None:
            key, source = result
            given.pop(key, None)  # so that the last one of a key also stands last
            given[key] = source
    for source in given.values():
        _override(merged, source)
        problems += source.problems
    _replace_start(merged)
    config, found = _validate(merged)
    problems += found
    problems += _preset_problem(merged, presets)
    if problems or config is None:
        raise UserError(_report(problems))
    return config


def _replace_start(merged: Source) -> None:
    """``model.from_pretrained`` on the command line replaces a file's preset, and conversely."""
    for given, other in (("from_pretrained", "preset"), ("preset", "from_pretrained")):
        place = merged.places.get(f"model.{other}", COMMAND_LINE)
        from_command_line = merged.places.get(f"model.{given}") == COMMAND_LINE
        if from_command_line and place != COMMAND_LINE and _lookup(merged.values, f"model.{given}"):
            merged.values["model"][other] = None
            del merged.places[f"model.{other}"]


def _report(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join(f"  {problem}" for problem in problems)
    return f"{len(problems)} problems in the configuration:\n{lines}"


def _collect(problems: list[str], read: Any, argument: Any) -> Any:
    try:
        return read(argument)
    except UserError as error:
        problems.append(str(error))
        return None


def _merge_file(merged: Source, source: Source | None, problems: list[str]) -> None:
    if source is None:
        return
    problems += source.problems
    for key in source.places:
        if key in merged.places and _lookup(merged.values, key) is not None:
            problems.append(
                f"{source.places[key]}: {key} is also given in {merged.places[key]}; "
                "keep one of the two, or give it on the command line"
            )
    _update(merged.values, source.values)
    merged.places.update(source.places)


def _override(merged: Source, source: Source) -> None:
    for key in source.places:
        for old in list(merged.places):
            if old.startswith(f"{key}.") or key.startswith(f"{old}."):
                del merged.places[old]
        section, _, name = key.partition(".")
        if _lookup(source.values, key) is None and isinstance(merged.values.get(section), dict):
            merged.values[section].pop(name, None)  # null replaces a mapping in a section too
    _update(merged.values, source.values)
    merged.places.update(source.places)


def _update(target: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _update(target[key], value)
        elif not (value is None and isinstance(target.get(key), dict)):
            target[key] = value


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _validate(merged: Source) -> tuple[RunConfig | None, list[str]]:
    """The checked configuration, or None and every problem with key, value and place."""
    values = dict(merged.values)
    for section in RunConfig.model_fields:
        if values.get(section) is None:  # `section:` with nothing below it
            values[section] = {}
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    wrong = {_key(detail) for detail in details if detail["loc"]}
    problems = []
    for detail in details:
        key = _key(detail)
        if not key or any(other.startswith(f"{key}.") for other in wrong):
            continue  # a rule across keys, or the consequence of a problem further down
        problems.append(f"{_place(merged, key)}{key}{describe(RunConfig, detail, values)}")
        if detail["type"] == "union_tag_invalid":
            section = str(detail["loc"][0])
            problems += [
                f"{_place(merged, unknown)}{unknown}: unknown key, whatever {section}.name is"
                for unknown in keys_of_no_member(RunConfig, section, values)
            ]
    for key, text in cross_problems(lambda key: _trusted_value(values, wrong, key)):
        value = _trusted_value(values, wrong, key)
        problems.append(f"{_place(merged, key)}{key} = {shown(value)}: {text}")
    return None, problems


def _key(detail: ErrorDetails) -> str:
    """The dotted key an error is about; "" for a rule across keys."""
    name = ".name" if detail["type"] == "union_tag_invalid" else ""
    return dotted_key(RunConfig, detail["loc"]) + name


def _trusted_value(values: dict[str, Any], wrong: set[str], key: str) -> Any:
    """The value of a key that pydantic accepted; the default when there is none."""
    section, name = key.split(".")
    if key in wrong or section in wrong or f"{section}.name" in wrong:
        return None
    if name in values[section]:
        return values[section][name]
    for cls in section_classes(RunConfig, section).values():
        field = cls.model_fields.get(name)
        if field is not None and not field.is_required():
            return field.default
    return None


def _place(merged: Source, key: str) -> str:
    """ "file:line: " of a key, of its list, or of any key of its section; "" when there is none."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        place = merged.places.get(".".join(parts[:length]))
        if place:
            return f"{place}: "
    inside = [place for known, place in merged.places.items() if known.startswith(f"{key}.")]
    return f"{inside[0]}: " if inside else ""


def _preset_problem(merged: Source, presets: Iterable[str] | None) -> list[str]:
    preset = _lookup(merged.values, "model.preset")
    if presets is None or not isinstance(preset, str):
        return []
    known = list(presets)
    if preset in known:
        return []
    close = nearest(preset, known)
    hint = f"; did you mean {close}?" if close else ""
    return [
        f"{_place(merged, 'model.preset')}model.preset = {shown(preset)}: must be one of "
        f"{', '.join(known)}{hint}"
    ]


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, everything else one key a line."""


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(list, _represent_list)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; ``load_run_config`` reads it back."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key to plain value (as in ``dump_config``)."""
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }
