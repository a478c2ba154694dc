"""Perplexity against memory and against time: which method is best for a budget, not for tokens.

    python benchmarks/study/pareto.py sweeps/table3_350m --reference full_rank \\
        --csv TABLE.csv --figure FILE.svg

Reads the runs and evaluations of sweeps in which one run at a time had a GPU: with several, seconds
are not those of the method. A group counts with its best setting, the mean over its seeds. Printed:
perplexity at the end, and when every run has had as many seconds as the reference's whole run; the
seconds to the perplexity that the reference has at the end; memory of weights and states, and the
measured peak. A method is on the front if no other is better in perplexity and not worse in memory
(or in seconds).
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tables import svg_figure, write_svg

from megalr.errors import UserError, exit_cleanly
from megalr.files import write_atomic
from megalr.sweep.results import RUNS_CSV, Row, read_csv
from megalr.sweep.summary import groups_of, settings_of

Curve = list[tuple[float, float]]
"""Seconds of training and perplexity, in order."""


@dataclass(frozen=True)
class Method:
    """A group's best setting.

    Attributes:
        name: of the group.
        perplexity: at the end, mean over the seeds.
        spread: standard deviation over the seeds, 0 for one.
        seeds: how many.
        states: GiB of weights and optimizer states.
        peak: measured GiB.
        curves: of each seed.
    """

    name: str
    perplexity: float
    spread: float
    seeds: int
    states: float
    peak: float
    curves: list[Curve]

    @property
    def curve(self) -> Curve:
        """The mean over the seeds, evaluation by evaluation."""
        points = zip(*self.curves, strict=False)
        return [
            (statistics.mean(t for t, _ in seeds), statistics.mean(p for _, p in seeds))
            for seeds in points
        ]

    @property
    def seconds(self) -> float:
        """Of a whole run."""
        return self.curve[-1][0]


def at_time(curve: Curve, seconds: float) -> float | None:
    """Perplexity after some seconds, linear between evaluations; None before the first.

    After its end a run keeps its last perplexity.
    """
    before = [point for point in curve if point[0] <= seconds]
    if not before:
        return None
    if len(before) == len(curve):
        return curve[-1][1]
    (t0, p0), (t1, p1) = before[-1], curve[len(before)]
    return p0 + (p1 - p0) * (seconds - t0) / (t1 - t0)


def time_to(curve: Curve, perplexity: float) -> float | None:
    """Seconds until the curve first reaches a perplexity; None if it never does."""
    last: tuple[float, float] | None = None
    for t, p in curve:
        if p <= perplexity:
            if last is None or last[1] == p:
                return t
            return last[0] + (t - last[0]) * (last[1] - perplexity) / (last[1] - p)
        last = (t, p)
    return None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points ``(cost, perplexity)`` no other point beats in both."""
    return [
        not any(c <= cost and p <= value and (c, p) != (cost, value) for c, p in points)
        for cost, value in points
    ]


def methods_of(sweep: Path) -> list[Method]:
    """The best setting of every group of a sweep.

    Raises:
        UserError: the folder holds no finished runs, or no evaluations.
    """
    rows = read_csv(sweep / RUNS_CSV) if (sweep / RUNS_CSV).exists() else []
    history = sweep / "history.csv"
    if not rows or not history.exists():
        raise UserError(f"{sweep}: no {RUNS_CSV} and history.csv: give the output of a sweep")
    curves: dict[str, Curve] = {}
    sets: dict[str, str] = {}
    for point in read_csv(history):
        name = str(point["run"])
        first = sets.setdefault(name, str(point["validation"]))
        if point["validation"] == first:
            curves.setdefault(name, []).append(
                (float(point["seconds"] or 0), float(point["perplexity"] or 0))
            )
    found = []
    for group, own in groups_of(rows).items():
        best = next((setting for setting in settings_of(own) if setting.eligible), None)
        if best is None:
            continue
        chosen = [row for row in own if _labels(row) == best.values and row["run"] in curves]
        if chosen:
            found.append(_method(group, chosen, curves))
    if not found:
        raise UserError(f"{sweep}: none of its {len(rows)} runs is finished")
    return found


def _labels(row: Row) -> dict[str, str]:
    """The label of a run by axis, of the axes that its group has."""
    axes = {name: value for name, value in row.items() if name.startswith("axis_") and value}
    return {name.removeprefix("axis_"): str(value) for name, value in axes.items()}


def _method(group: str, rows: list[Row], curves: dict[str, Curve]) -> Method:
    values = [float(row["perplexity"] or "nan") for row in rows]
    return Method(
        group,
        statistics.mean(values),
        statistics.stdev(values) if len(values) > 1 else 0.0,
        len(values),
        float(rows[0]["weights_and_states_gib"] or 0),
        max(float(row["peak_memory_gib"] or 0) for row in rows),
        [curves[str(row["run"])] for row in rows],
    )


def rows_of(methods: list[Method], reference: Method) -> list[dict[str, str]]:
    """The table, the best at the reference's time first."""
    budget, goal = reference.seconds, reference.perplexity
    equal = [at_time(m.curve, budget) for m in methods]
    reach = [time_to(m.curve, goal) for m in methods]
    small = front([(m.states, m.perplexity) for m in methods])
    fast = front([(m.seconds, m.perplexity) for m in methods])
    rows = [
        {
            "method": m.name,
            "perplexity": f"{m.perplexity:.1f}" + (f" ± {m.spread:.1f}" if m.seeds > 1 else ""),
            "at equal seconds": f"{e:.1f}" if e is not None else "",
            "seconds": f"{m.seconds:.0f}",
            f"seconds to {reference.name}'s": f"{r:.0f}" if r is not None else "never",
            "weights and states, GiB": f"{m.states:.3f}",
            "peak, GiB": f"{m.peak:.2f}",
            "on a front": " and ".join(word for word, on in (("memory", s), ("time", f)) if on),
        }
        for m, e, r, s, f in zip(methods, equal, reach, small, fast, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: (equal[i] is None, equal[i] or 0.0))
    return [rows[i] for i in order]


def draw(methods: list[Method], path: Path) -> None:
    """Perplexity against memory, and against the seconds of training."""
    figure = svg_figure((10, 4))
    left, right = figure.subplots(1, 2)
    points = [(m.states, m.perplexity) for m in methods]
    best = sorted(p for p, on in zip(points, front(points), strict=True) if on)
    left.step(*zip(*best, strict=True), where="post", color="0.8", zorder=1)
    for index, m in enumerate(methods):
        color = f"C{index % 10}"
        left.scatter(m.states, m.perplexity, color=color, zorder=2)
        left.annotate(m.name, (m.states, m.perplexity), xytext=(4, 4), textcoords="offset points")
        for curve in m.curves:
            right.plot(*zip(*curve, strict=True), color=color, linewidth=1)
        right.scatter(m.seconds, m.perplexity, color=color, zorder=2, label=m.name)
    left.set(xlabel="weights and optimizer states, GiB", ylabel="perplexity after equal tokens")
    right.set(xlabel="seconds of training on one GPU", ylabel="perplexity", yscale="log")
    right.legend(fontsize=8)
    write_svg(figure, path)


def main() -> None:
    """Print the table; write it and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sweeps", type=Path, nargs="+", help="output folders of tools/sweep.py")
    parser.add_argument("--reference", default="full_rank", help="the group that sets the time")
    parser.add_argument("--csv", type=Path, help="table to write")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    methods = [method for sweep in arguments.sweeps for method in methods_of(sweep)]
    reference = next((m for m in methods if m.name == arguments.reference), None)
    if reference is None:
        names = ", ".join(m.name for m in methods)
        raise UserError(f"--reference {arguments.reference}: the groups are {names}")
    rows = rows_of(methods, reference)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if arguments.csv is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(arguments.csv, text.getvalue().encode())
    if arguments.figure is not None:
        draw(methods, arguments.figure)


if __name__ == "__main__":
    exit_cleanly(main)
