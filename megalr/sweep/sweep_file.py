"""The YAML of a sweep: its keys, and reading it with every problem named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from megalr.config.base import AsTuple, Section
from megalr.config.problems import nearest, shown
from megalr.config.yaml_source import Source, read_file
from megalr.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*", re.ASCII)
"""Names of sweeps, groups, axes and choices: parts of file names that are joined by ``__``."""


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("must consist of letters, digits, single _ and . + -, as in low_rank")
    return name


def _check_override(text: str) -> str:
    if not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)+=.*", text, re.DOTALL):
        raise ValueError("must have the form section.key=value")
    return text


Name = Annotated[str, AfterValidator(_check_name)]
Override = Annotated[str, AfterValidator(_check_override)]
Overrides = Annotated[tuple[Override, ...], AsTuple]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsTuple, Field(min_length=1)]


class AxisSection(Section):
    """One axis: a key and its values, several keys that share a value, or named choices."""

    key: str | None = None
    """The key that takes the values."""
    keys: Annotated[tuple[str, ...], AsTuple] | None = Field(default=None, min_length=1)
    """Keys that take the same value."""
    values: Annotated[tuple[Any, ...], AsTuple] | None = Field(default=None, min_length=1)
    """Values of key or keys; not needed for numbers that a table of an earlier sweep gives."""
    choices: dict[Name, Overrides] | None = Field(default=None, min_length=1)
    """Lists of overrides by name, instead of key and values."""

    @model_validator(mode="after")
    def _check(self) -> AxisSection:
        given = [name for name in ("key", "keys", "choices") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("needs one of key, keys and choices")
        if self.values is not None and self.choices is not None:
            raise ValueError("has choices, which take no values")
        return self


class GroupSection(Section):
    """A grid: every combination of its axes and seeds is a run."""

    base: str | None = Field(default=None, min_length=1)
    """YAML of its runs; that of the sweep where it is missing."""
    set: Overrides = ()
    """Overrides of its runs; they replace those of the sweep."""
    seeds: Seeds | None = None
    """Values of run.seed; those of the sweep where it is missing."""
    axes: dict[Name, AxisSection] = Field(default_factory=dict)
    """The axes by name."""

    @field_validator("axes", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value


class FromSection(Section):
    """The settings of an earlier sweep that are run, in place of all combinations."""

    csv: str = Field(min_length=1)
    """Its runs.csv."""
    best: int = Field(default=3, ge=1)
    """Settings of each group, those with the lowest perplexity."""
    neighbours: bool = True
    """Whether those one step away along a numeric axis are run too."""


class SweepFile(Section):
    """A sweep: a base run and groups of runs that differ from it."""

    name: Name
    """Name of the sweep; the file's stem where it is missing."""
    base: str | None = Field(default=None, min_length=1)
    """YAML of one run."""
    deepspeed_config: str | None = Field(default=None, min_length=1)
    """DeepSpeed JSON of all runs; ZeRO stage 1 where it is missing."""
    set: Overrides = ()
    """Overrides of all runs."""
    seeds: Seeds | None = None
    """Values of run.seed; that of the base where it is missing."""
    source: FromSection | None = Field(default=None, alias="from")
    """An earlier sweep whose best settings are run."""
    groups: dict[Name, GroupSection] = Field(min_length=1)
    """The grids by name."""

    @field_validator("groups", mode="before")
    @classmethod
    def _empty_groups(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {} if group is None else group for name, group in value.items()}


def read_sweep_file(path: Path) -> SweepFile:
    """Read and check the YAML of a sweep; scalars are those of YAML 1.2, as in a run's.

    Raises:
        UserError: it cannot be read, or holds mistakes: one line for each, with its place.
    """
    source = read_file(path)
    values = {"name": re.sub(r"[^A-Za-z0-9.+-]+", "_", path.stem).strip("_"), **source.values}
    problems = list(source.problems)
    try:
        sweep = SweepFile.model_validate(values)
    except ValidationError as error:
        problems += [_describe(source, path, detail) for detail in error.errors(include_url=False)]
    else:
        problems += [
            f"{path}: groups.{name}: no base here and none of the sweep: name the YAML of a run"
            for name, group in sweep.groups.items()
            if group.base is None and sweep.base is None
        ]
        problems += [
            f"{path}: groups.{name}.axes.{axis}: no values: give a list of at least one"
            for name, group in sweep.groups.items()
            for axis, section in group.axes.items()
            if section.values is None and section.choices is None and sweep.source is None
        ]
        if not problems:
            return sweep
    raise UserError(many_problems(problems, "the sweep"))


def many_problems(problems: list[str], of: str) -> str:
    """The text of an error: the problem itself, or a heading and one line for each."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems in {of}:", *(f"  {line}" for line in problems)])


def find_path(text: str, folders: Sequence[Path]) -> Path:
    """A file that a sweep names.

    Raises:
        UserError: it is in none of the folders.
    """
    for folder in folders:
        path = folder / Path(text).expanduser()
        if path.is_file():
            return path
    raise UserError(f"{text}: no such file in {' or '.join(str(f.resolve()) for f in folders)}")


def _describe(source: Source, path: Path, detail: Any) -> str:
    """One line about an error of pydantic."""
    parts = [str(part) for part in detail["loc"] if part != "[key]"]
    key = ".".join(parts)
    inside = [p for known, p in source.places.items() if f"{known}.".startswith(f"{key}.")]
    place = source.places.get(".".join(parts[:-1]), inside[0] if inside else str(path))
    if detail["type"] == "missing":
        return f"{place}: {key}: required, but not given"
    text = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if detail["type"] == "extra_forbidden":
        sections: dict[int, type[Section]] = {1: SweepFile, 3: GroupSection, 5: AxisSection}
        if parts[0] == "from":
            sections = {2: FromSection}
        fields = sections[len(parts)].model_fields if len(parts) in sections else {}
        known = [field.alias or name for name, field in fields.items()]
        close = nearest(parts[-1], known)
        hint = f"; did you mean {close}?" if close else ""
        text = f"unknown key{hint} (the keys are {', '.join(known)})"
    return f"{place}: {key} = {shown(detail['input'])}: {text[0].lower()}{text[1:]}"
