"""Settings of one part of the study with mean and standard deviation over seeds, as Markdown.

    python benchmarks/study/seeds.py --study architectures --size 20M --figure FILE.svg

Reads ``benchmarks/results/study/runs.csv``. A line per setting, those of a group together and the
lowest perplexity on C4 first; of the settings only what differs between the lines. Failed and
diverged runs are counted and not in the means. The figure has a line per setting too, with a circle
for every run and a bar at the mean; ``--line NAME=VALUE`` marks a perplexity to compare with.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from pathlib import Path

from collect import KEY, LIST
from tables import svg_figure, write_svg

from megalr.errors import UserError, exit_cleanly
from megalr.sweep.results import Row

SETS = {"perplexity_c4": "C4", "perplexity_mix": "mix"}
"""Columns of the validation sets, with their names in the table."""


def settings_of(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows by their values of KEY, the seed aside."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row.get(name) or "") for name in KEY if name != "seed")
        found.setdefault(key, []).append(row)
    return found


def mean_of(rows: list[Row], column: str) -> tuple[float, str]:
    """The mean over the finished runs, inf without one, and the same as text with the spread."""
    values = [float(r[column]) for r in rows if r["status"] == "finished" and r.get(column)]
    if not values:
        return math.inf, ""
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return mean, f"{mean:.1f}{spread}"


def ordered(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """:func:`settings_of` with groups, and settings in them, by their lowest mean on C4."""
    settings = settings_of(rows)
    means = {key: mean_of(own, "perplexity_c4")[0] for key, own in settings.items()}
    group_of = {key: str(own[0]["group"]) for key, own in settings.items()}
    best: dict[str, float] = {}
    for key, group in group_of.items():
        best[group] = min(best.get(group, math.inf), means[key])
    order = sorted(settings, key=lambda key: (best[group_of[key]], group_of[key], means[key]))
    return {key: settings[key] for key in order}


def draw(rows: list[Row], size: str, marks: dict[str, float], path: Path) -> None:
    """Perplexity on C4 of every setting, run by run."""
    settings = list(ordered(rows).values())
    figure = svg_figure((7.5, 0.24 * len(settings) + 1.0))
    axes = figure.subplots()
    for place, own in enumerate(reversed(settings)):
        values = [float(r["perplexity_c4"]) for r in own if r["status"] == "finished"]
        axes.scatter(values, [place] * len(values), s=18, facecolors="none", edgecolors="tab:blue")
        if values:
            axes.scatter(statistics.mean(values), place, marker="|", s=120, color="black")
    for name, value in marks.items():
        axes.axvline(value, color="0.6", linestyle=":", zorder=0)
        above = axes.get_xaxis_transform()
        axes.text(value, 1.0, name, transform=above, fontsize=8, ha="center", va="bottom")
    labels = [f"{own[0]['group']} {own[0].get('setting') or ''}".strip() for own in settings]
    axes.set_yticks(range(len(settings)), list(reversed(labels)), fontsize=8)
    axes.set_xlabel(f"perplexity on C4 (2,000-document sample), {size}; a circle is a run")
    axes.grid(axis="x", alpha=0.3)
    write_svg(figure, path)


def table(rows: list[Row]) -> str:
    """The settings as a Markdown table."""
    settings = ordered(rows)
    names = [name for name in KEY if name != "seed"]
    shown = [i for i in range(len(names)) if len({key[i] for key in settings}) > 1]
    sets = [column for column in SETS if any(row.get(column) for row in rows)]
    head = [*(names[i] for i in shown), *(SETS[column] for column in sets), "runs", "not finished"]
    lines = [head, ["---"] * len(head)]
    for key, own in settings.items():
        bad = sum(row["status"] != "finished" for row in own)
        cells = [mean_of(own, column)[1] for column in sets]
        lines.append([*(key[i] for i in shown), *cells, str(len(own)), str(bad)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--study", required=True, help="as given to collect.py")
    parser.add_argument("--size", required=True, help="such as 20M")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    parser.add_argument("--line", nargs="*", default=[], metavar="NAME=VALUE", help="to mark in it")
    given = parser.parse_args()
    with LIST.open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["study"], row["size"]) == (given.study, given.size)
        ]
    if not rows:
        raise UserError(f"--study {given.study} --size {given.size}: the list has no such run")
    print(table(rows))
    if given.figure is not None:
        marks = {name: float(value) for name, _, value in (x.partition("=") for x in given.line)}
        draw(rows, given.size, marks, given.figure)


if __name__ == "__main__":
    exit_cleanly(main)
