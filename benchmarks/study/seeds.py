"""Settings of one part of the study with mean and standard deviation over seeds, as Markdown.

    python benchmarks/study/seeds.py --study architectures --size 20M

Reads ``benchmarks/results/study/runs.csv``. A line per setting, those of a group together and the
lowest perplexity on C4 first; of the settings only what differs between the lines. Failed and
diverged runs are counted and not in the means.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics

from collect import KEY, LIST

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


def table(rows: list[Row]) -> str:
    """The settings as a Markdown table."""
    settings = settings_of(rows)
    names = [name for name in KEY if name != "seed"]
    shown = [i for i in range(len(names)) if len({key[i] for key in settings}) > 1]
    sets = [column for column in SETS if any(row.get(column) for row in rows)]
    best: dict[str, float] = {}
    for own in settings.values():
        group = own[0]["group"]
        best[group] = min(best.get(group, math.inf), mean_of(own, "perplexity_c4")[0])
    order = sorted(
        settings.items(),
        key=lambda item: (
            *(best[item[1][0]["group"]], item[1][0]["group"]),
            mean_of(item[1], "perplexity_c4")[0],
        ),
    )
    head = [*(names[i] for i in shown), *(SETS[column] for column in sets), "runs", "not finished"]
    lines = [head, ["---"] * len(head)]
    for key, own in order:
        bad = sum(row["status"] != "finished" for row in own)
        cells = [mean_of(own, column)[1] for column in sets]
        lines.append([*(key[i] for i in shown), *cells, str(len(own)), str(bad)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--study", required=True, help="as given to collect.py")
    parser.add_argument("--size", required=True, help="such as 20M")
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


if __name__ == "__main__":
    exit_cleanly(main)
