"""Table and figure of one size of the study, from ``benchmarks/results/study/runs.csv``.

    python benchmarks/study/tables.py --size 20M --figure benchmarks/results/study/table3_20m.svg

For each method the best run of all, and the best of those with one learning rate for all
parameters (ratio 1, as published). A best value at the end of its axis is marked.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collect import LIST

from megalr.errors import UserError, exit_cleanly
from megalr.files import write_atomic
from megalr.sweep.results import Row

AXES = ("lr", "alpha", "lr_ratio_embedding", "adam_lr_ratio")
"""What was swept, where a method has it."""


def best_of(rows: list[Row], wanted: Callable[[Row], bool] = lambda _: True) -> Row | None:
    """The finished run of lowest perplexity among those wanted."""
    chosen = [row for row in rows if row["status"] == "finished" and wanted(row)]
    return min(chosen, key=lambda row: float(row["perplexity_c4"]), default=None)


def shares_one_rate(row: Row) -> bool:
    """Whether embedding and head have the learning rate of everything else."""
    return not row["adam_lr_ratio"] and float(row["lr_ratio_embedding"]) == 1


def at_edge(rows: list[Row], best: Row) -> list[str]:
    """Axes at whose lowest or highest value the best run lies, in words."""
    found = []
    for axis in AXES:
        values = sorted({float(row[axis]) for row in rows if row[axis]})
        if len(values) > 1 and float(best[axis]) in (values[0], values[-1]):
            found.append(axis.removesuffix("_embedding"))
    return found


def methods_of(rows: list[Row], size: str) -> dict[str, list[Row]]:
    """Rows of a size by group, the group of the lowest perplexity first.

    Raises:
        UserError: there is none of this size.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["size"] == size and row["study"] == "table3":
            groups.setdefault(row["group"], []).append(row)
    groups = {name: own for name, own in groups.items() if best_of(own) is not None}
    if not groups:
        raise UserError(f"--size {size}: the list has no finished run of this size")
    return dict(sorted(groups.items(), key=lambda item: float(_best(item[1])["perplexity_c4"])))


def _best(rows: list[Row]) -> Row:
    best = best_of(rows)
    assert best is not None  # methods_of leaves out groups without one
    return best


def table(groups: dict[str, list[Row]]) -> str:
    """The methods as a Markdown table, the best first."""
    lines = [
        "| method | perplexity | learning rate | ratio | alpha | with one learning rate | runs "
        "| million parameters | at the end of its axis |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in groups.items():
        best, shared = _best(rows), best_of(rows, shares_one_rate)
        ratio = best["adam_lr_ratio"] or f"{float(best['lr_ratio_embedding']):g}"
        alpha = f"{float(best['alpha']):g}" if best["alpha"] else ""
        published = f"{float(shared['perplexity_c4']):.1f} ({shared['lr']})" if shared else ""
        lines.append(
            f"| {name} | {float(best['perplexity_c4']):.1f} | {best['lr']} | {ratio} | {alpha} | "
            f"{published} | {len(rows)} | {int(best['parameters']) / 1e6:.1f} | "
            f"{', '.join(at_edge(rows, best))} |"
        )
    return "\n".join(lines)


def svg_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure for :func:`write_svg`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def write_svg(figure: Any, path: Path) -> None:
    """Write a figure without its date: the same numbers give the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(path, buffer.getvalue())


def draw(groups: dict[str, list[Row]], size: str, path: Path) -> None:
    """Perplexity of every method, with one learning rate and with one of its own for embedding
    and head, joined by a line."""
    figure = svg_figure((7.5, 0.32 * len(groups) + 1.2))
    axes = figure.subplots()
    for place, rows in enumerate(reversed(groups.values())):
        free, shared = float(_best(rows)["perplexity_c4"]), best_of(rows, shares_one_rate)
        if shared is not None:
            published = float(shared["perplexity_c4"])
            axes.plot([free, published], [place, place], color="0.75", zorder=1)
            axes.scatter(published, place, facecolors="white", edgecolors="tab:red", zorder=2)
        axes.scatter(free, place, color="tab:blue", zorder=3)
    axes.scatter([], [], facecolors="white", edgecolors="tab:red", label="one learning rate")
    axes.scatter([], [], color="tab:blue", label="embedding and head with their own")
    axes.set_yticks(range(len(groups)), list(reversed(groups)))
    axes.set_xlabel(f"perplexity on C4 (2,000-document sample), {size}, best of the grid, one seed")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    write_svg(figure, path)


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--size", required=True, help="such as 20M")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    with LIST.open(encoding="utf-8", newline="") as file:
        groups = methods_of(list(csv.DictReader(file)), arguments.size)
    print(table(groups))
    if arguments.figure is not None:
        draw(groups, arguments.size, arguments.figure)


if __name__ == "__main__":
    exit_cleanly(main)
