"""From a sweep file to its runs: every combination of axes and seeds, named and checked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalr.config.loading import load_run_config
from megalr.config.schema import RunConfig
from megalr.engine.build import check_run
from megalr.engine.config import read_deepspeed_json, resolve_deepspeed_config
from megalr.errors import UserError
from megalr.estimate.memory import GIB, estimate_memory
from megalr.hf.init_from_pretrained import with_pretrained_sizes
from megalr.models.config import PRESETS
from megalr.sweep.sweep_file import (
    AxisSection,
    GroupSection,
    SweepFile,
    find_path,
    many_problems,
)

DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 1}}
LONGEST_RUN_NAME = 200
"""Characters; file systems allow 255, and files of the run carry more than its name."""
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?", re.ASCII)
"""Labels that :func:`number_label` writes."""
OWN_KEYS = ("run.dir", "run.resume")
"""Keys that the sweep gives every run."""


@dataclass(frozen=True)
class Point:
    """One value of an axis.

    Attributes:
        label: as in names and tables.
        overrides: what it sets.
        number: the value, if it is a number.
    """

    label: str
    overrides: tuple[str, ...]
    number: float | None = None


@dataclass(frozen=True)
class Scope:
    """What is run of a sweep, beside its file.

    Attributes:
        overrides: of all runs, from the command line.
        extensions: further values by group and axis.
        selected: the settings to run by group, as labels by axis; None: all combinations.
    """

    overrides: Sequence[str] = ()
    extensions: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    selected: Mapping[str, Sequence[Mapping[str, str]]] | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: of the run and its folder: group, axes and seed.
        group: of the sweep.
        points: by the name of the axis.
        seed: ``run.seed``.
        base: its YAML.
        deepspeed_config: its DeepSpeed JSON; None: ZeRO stage 1.
        overrides: on the command line, ``run.dir`` included.
        config: what these come to.
        states_gib: GiB of weights, masters and optimizer state on one GPU.
    """

    name: str
    group: str
    points: dict[str, Point]
    seed: int
    base: Path
    deepspeed_config: Path | None
    overrides: tuple[str, ...]
    config: RunConfig
    states_gib: float

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def arguments(self) -> list[str]:
        """Arguments of launchers/pretrain.py."""
        words = ["--config", str(self.base)]
        if self.deepspeed_config is not None:
            words += ["--deepspeed_config", str(self.deepspeed_config)]
        return [*words, *self.overrides]


EVERYTHING = Scope()
"""All combinations of the file."""


def number_label(value: float) -> str:
    """A number in names: the shortest that is exact, ``1.5e-3`` below 0.01 and from 1e6 on."""
    if isinstance(value, int) and abs(value) < 10**6:
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10**6:
        return repr(float(value)).removesuffix(".0")
    mantissa = next(text for d in range(18) if float(text := f"{value:.{d}e}") == float(value))
    digits, _, exponent = mantissa.partition("e")
    return f"{digits}e{int(exponent)}"


def value_label(value: Any) -> str:
    """A value in names: numbers by :func:`number_label`, else its text without other characters."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_label(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "empty"


def value_points(keys: Sequence[str], values: Sequence[Any]) -> tuple[Point, ...]:
    """The points of an axis that gives ``keys`` each of ``values``."""
    points = []
    for value in values:
        text = json.dumps(value, ensure_ascii=False)  # JSON is YAML, and no text becomes a number
        number = float(value) if type(value) in (int, float) else None
        points.append(Point(value_label(value), tuple(f"{key}={text}" for key in keys), number))
    return tuple(points)


def points_of(axis: AxisSection, further: Sequence[float] = ()) -> tuple[Point, ...]:
    """All points of an axis, in the order of the file, then ``further`` values."""
    if axis.choices is not None:
        return tuple(Point(name, overrides) for name, overrides in axis.choices.items())
    keys = axis.keys if axis.keys is not None else (axis.key or "",)
    return value_points(keys, (*(axis.values or ()), *further))


def point_of(name: str, axis: AxisSection, label: str) -> Point:
    """The point of an axis with this label: one of the file's, or any number of a numeric axis.

    Raises:
        UserError: there is none.
    """
    for point in points_of(axis):
        if point.label == label:
            return point
    if axis.choices is None and NUMBER.fullmatch(label):
        value = int(label) if label.isdigit() else float(label)
        return points_of(AxisSection(key=axis.key, keys=axis.keys), (value,))[0]
    labels = ", ".join(point.label for point in points_of(axis))
    raise UserError(f"axis {name} has no value {label}: add it (it has {labels or 'none'})")


def plan_runs(
    sweep: SweepFile, folders: Sequence[Path], output: Path, scope: Scope = EVERYTHING
) -> list[PlannedRun]:
    """All runs of a sweep, in the order of the file, seeds innermost.

    Args:
        sweep: the file's content.
        folders: where relative paths of the file start from; the first that leads to a file counts.
        output: folder of the sweep; a run's folder is ``output/runs/NAME``.
        scope: what is run of it.

    Raises:
        UserError: mistakes in the runs, one line each; the same mistake of several runs once.
    """
    problems: dict[str, list[str]] = {}
    runs: dict[str, PlannedRun] = {}
    for name, group in sweep.groups.items():
        try:
            drafts = list(_drafts(sweep, name, group, folders, scope))
        except UserError as error:
            problems.setdefault(f"groups.{name}: {error}", [])
            continue
        for draft in drafts:
            try:
                run = draft.plan(output)
            except UserError as error:
                for line in _lines(error):
                    problems.setdefault(line, []).append(draft.label)
                continue
            if run.name in runs:
                problems.setdefault(f"{run.name}: planned twice: remove the repeated value", [])
            runs[run.name] = run
    if problems:
        lines = [f"{_where(labels)}{line}" for line, labels in problems.items()]
        raise UserError(many_problems(lines, "the runs of the sweep"))
    return list(runs.values())


def _lines(error: UserError) -> list[str]:
    """The problems of an error of load_run_config."""
    first, *rest = str(error).splitlines()
    return [line.strip() for line in rest] or [first]


def _where(labels: list[str]) -> str:
    if not labels:
        return ""
    return f"{labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''}: "


@dataclass(frozen=True)
class _Draft:
    """A run before its check; ``seed`` None is the base's."""

    group: str
    points: dict[str, Point]
    seed: int | None
    base: Path
    deepspeed_config: Path | None
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name, without the seed where that is the base's."""
        seed = () if self.seed is None else (f"seed={self.seed}",)
        axes = (f"{axis}={point.label}" for axis, point in self.points.items())
        return "__".join((self.group, *axes, *seed))

    def plan(self, output: Path) -> PlannedRun:
        """The run, checked as ``--print_config`` does, and its states' size."""
        given = self.overrides
        if self.seed is not None:
            given = (*given, f"run.seed={self.seed}")
        config = load_run_config([self.base], (*given, "run.dir=."), presets=PRESETS)
        name = self.label if self.seed is not None else f"{self.label}__seed={config.run.seed}"
        if len(name) > LONGEST_RUN_NAME:
            raise UserError(
                f"{name}: {len(name)} characters: shorten names of axes and choices to at most "
                f"{LONGEST_RUN_NAME} in all"
            )
        given = (*given, f"run.dir={json.dumps(str(output / 'runs' / name), ensure_ascii=False)}")
        config = load_run_config([self.base], given, presets=PRESETS)
        return PlannedRun(
            name,
            self.group,
            self.points,
            config.run.seed,
            self.base,
            self.deepspeed_config,
            given,
            config,
            _states_gib(config, self.deepspeed_config),
        )


def _states_gib(config: RunConfig, deepspeed_config: Path | None) -> float:
    """GiB of weights, masters and states on one GPU; rejects what the engine would reject."""
    ds_user, source = DEFAULT_DEEPSPEED, "default DeepSpeed config"
    if deepspeed_config is not None:
        ds_user, source = read_deepspeed_json(deepspeed_config), str(deepspeed_config)
    stage = resolve_deepspeed_config(config, ds_user, source, 1)["zero_optimization"]["stage"]
    check_run(config, stage)
    states = estimate_memory(with_pretrained_sizes(config), ds_user, source, gpus=1).states
    return (states.weights + states.frozen + states.masters + states.moments) / GIB


def _drafts(
    sweep: SweepFile, name: str, group: GroupSection, folders: Sequence[Path], scope: Scope
) -> Iterator[_Draft]:
    """The runs of a group, not checked yet."""
    base = find_path(group.base or sweep.base or "", folders)
    deepspeed = sweep.deepspeed_config
    deepspeed_config = None if deepspeed is None else find_path(deepspeed, folders)
    last = _by_key(scope.overrides, "command line")
    fixed = _by_key(sweep.set, "set") | _by_key(group.set, "set of the group") | last
    seeds: tuple[int | None, ...] = group.seeds or sweep.seeds or (None,)
    for points, seed in itertools.product(_settings(name, group, scope), seeds):
        varied: dict[str, str] = {}
        for axis, point in points.items():
            own = _by_key(point.overrides, f"axis {axis}")
            twice = [key for key in own if key in varied or key in last]
            if twice:
                raise UserError(f"axis {axis} sets {twice[0]}, which is also set elsewhere")
            varied |= own
        if "run.seed" in fixed | varied and seed is not None:
            raise UserError("run.seed is set and there are seeds: remove one of them")
        overrides = tuple((fixed | varied).values())
        yield _Draft(name, points, seed, base, deepspeed_config, overrides)


def _settings(name: str, group: GroupSection, scope: Scope) -> list[dict[str, Point]]:
    """Points by axis: every combination, or those that are selected."""
    if scope.selected is not None:
        return [
            {axis: point_of(axis, section, labels[axis]) for axis, section in group.axes.items()}
            for labels in scope.selected[name]
        ]
    further = scope.extensions.get(name, {})
    axes = {axis: points_of(s, further.get(axis, ())) for axis, s in group.axes.items()}
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def _by_key(overrides: Sequence[str], where: str) -> dict[str, str]:
    """Overrides by key; refuses a key that is given twice, or that is the sweep's."""
    found: dict[str, str] = {}
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in found:
            raise UserError(f"{where} gives {key} twice: {found[key]} and {text}")
        if key in OWN_KEYS:
            raise UserError(f"{where} gives {key}, which the sweep chooses: remove it")
        found[key] = text
    return found
