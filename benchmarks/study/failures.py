"""What went wrong in runs and what their health checks did, as a Markdown table.

    python benchmarks/study/failures.py sweeps/failures_20m/runs/*

The rise is the largest loss in the AFTER updates behind a restart minus the loss at it, of the
restart where that is most (nats; with log.every=1). Everything else is counted from the events of
metrics.jsonl, those of updates that a rollback left behind included.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

from megalr.errors import exit_cleanly
from megalr.run.metrics_reader import Run, read_run

AFTER = 20
COUNTED = ("spike", "skip", "reset", "rollback")
"""Events that health checks write; the columns of the table."""


def rise_after_restarts(run: Run) -> float | None:
    """Largest rise of the loss behind a restart (nats); None without restarts, inf if it diverges.

    Updates whose loss was not logged do not count.
    """
    losses = {e["update"]: e["loss"] for e in run.events if e["event"] == "step"}
    rises = []
    for event in run.events:
        update = event["update"]
        if event["event"] == "restart" and update in losses:
            behind = [losses[u] for u in range(update + 1, update + AFTER + 1) if u in losses]
            finite = all(loss is not None and math.isfinite(loss) for loss in behind)
            rises.append(max(behind) - losses[update] if behind and finite else math.inf)
    return max(rises, default=None)


def cells(run: Run) -> list[str]:
    """Name, updates, last perplexity, its million parameters, rise and counts of a run."""
    counts = Counter(event["event"] for event in run.events)
    evaluation, step = run.latest("eval"), run.latest("step")
    parameters = run.last("start").get("parameters")
    rise = rise_after_restarts(run)
    perplexity = evaluation.get("perplexity", math.nan)
    return [
        run.name,
        str(step.get("update", 0)),
        f"{perplexity:.1f}",
        "" if parameters is None else f"{parameters / 1e6:.1f}",
        "" if rise is None else f"{rise:.2f}",
        *(str(counts[name]) for name in COUNTED),
    ]


def table(runs: list[Run]) -> str:
    """The runs as a Markdown table, in the given order."""
    head = [
        "run",
        "updates",
        "perplexity",
        "million parameters",
        "rise",
        *map("{}s".format, COUNTED),
    ]
    lines = [head, ["---"] * len(head), *map(cells, runs)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    print(table([read_run(folder) for folder in parser.parse_args().runs]))


if __name__ == "__main__":
    exit_cleanly(main)
