"""Compare runs: a page with final numbers, differing settings and curves, or the curves alone.

python tools/report.py runs/A runs/B --output report.html
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.errors import UserError, exit_cleanly
from megalr.files import disk_errors, replace_file
from megalr.run.metrics_reader import Run, perplexity_change, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """(label, run): the folder's name, or its whole path where two runs have the same name."""
    names = [run.name for run in runs]
    return [
        (n if names.count(n) == 1 else str(r.folder), r) for n, r in zip(names, runs, strict=True)
    ]


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, value per run as text) for every key whose value differs between the runs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [(key, [_text(run.config.get(key, "—")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def summary(run: Run) -> dict[str, Any]:
    """Final numbers of a run, by their names in the report."""
    start, step, evaluation = run.last("start"), run.last("step"), run.last("eval")
    speeds = [e["tokens_per_second"] for e in run.series("step") if "tokens_per_second" in e]
    restarts = [e for e in run.events if e["event"] == "restart"]
    return {
        "model": start.get("model"),
        "method": start.get("method"),
        "parameters": start.get("parameters"),
        "precision": start.get("precision"),
        "ZeRO stage": start.get("zero_stage"),
        "ranks": start.get("world_size"),
        "updates": max(e["update"] for e in run.events),
        "training tokens": step.get("tokens"),
        "training loss": step.get("loss"),
        "validation loss": evaluation.get("loss"),
        "validation perplexity": evaluation.get("perplexity"),
        "perplexity, published formula": evaluation.get("perplexity_published"),
        "validation tokens": evaluation.get("tokens"),
        "tokens per second (median)": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "model FLOP utilisation": step.get("mfu"),
        "peak memory (GiB)": step.get("peak_memory_gib"),
        "restarts": len(restarts),
        "refactorization time (s)": sum(e.get("refactorize_seconds", 0) for e in restarts),
        "ended": run.last("end").get("reason", "not yet"),
        "versions": start.get("versions"),
    }


def _text(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


PANELS: tuple[tuple[str, str, str, str, str], ...] = (
    # event, value, against, title, scale of the value axis
    ("step", "loss", "update", "training loss", "linear"),
    ("eval", "perplexity", "update", "validation perplexity", "log"),
    ("eval", "perplexity", "tokens", "validation perplexity by training tokens", "log"),
    ("step", "gradient_norm", "update", "gradient norm", "log"),
    ("step", "learning_rate", "update", "learning rate", "linear"),
    ("step", "tokens_per_second", "update", "tokens per second", "linear"),
)


def curves(runs: Sequence[Run], panels: int = 2) -> Figure:
    """The first ``panels`` of ``PANELS``, two per row, one line per run; restarts are marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = math.ceil(panels / 2)
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (event, value, against, title, scale) in zip(axes, PANELS[:panels], strict=False):
        for number, (label, run) in enumerate(labelled(runs)):
            points = [p for p in _points(run, event, value, against) if math.isfinite(p[1])]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, color=f"C{number}")
            if against == "update" and event == "step" and value == "loss":
                _mark_restarts(axis, run, f"C{number}")
        axis.set_title(title)
        axis.set_xlabel({"update": "updates", "tokens": "training tokens"}[against])
        axis.set_yscale(scale)
        if scale == "log":
            for ticks in ("major", "minor"):  # 200 instead of 2 x 10^2
                formatter = LogFormatter(minor_thresholds=(2, 0.5))
                getattr(axis.yaxis, f"set_{ticks}_formatter")(formatter)
        axis.grid(alpha=0.3)
        if len(runs) > 1 and axis.lines:
            axis.legend(fontsize=8)
    for axis in axes[panels:]:
        axis.remove()
    return figure


def _points(run: Run, event: str, value: str, against: str) -> list[tuple[float, float]]:
    """(x, y) of one curve; the training tokens of an evaluation are those of the step before it."""
    trained = [(step["update"], step.get("tokens", 0)) for step in run.series("step")]
    points = []
    for item in run.series(event):
        x: float = item["update"]
        if against == "tokens":
            x = max((tokens for update, tokens in trained if update <= item["update"]), default=0)
        if isinstance(item.get(value), int | float):
            points.append((x, float(item[value])))
    return points


def _mark_restarts(axis: Axes, run: Run, colour: str) -> None:
    restarts = run.series("restart")
    if len(restarts) <= 50:  # more would hide the curve
        for restart in restarts:
            axis.axvline(restart["update"], color=colour, alpha=0.2, linewidth=0.8)


def write_png(runs: Sequence[Run], output: Path) -> None:
    """Training loss and validation perplexity of the runs as a PNG."""
    _save(output, _png(curves(runs)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _save(output: Path, content: bytes) -> None:
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, content)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { background: #f3f3f3 } td { font-variant-numeric: tabular-nums }
"""


def write_html(runs: Sequence[Run], output: Path) -> None:
    """One page without links to other files: final numbers, differing settings, all curves."""
    labels = [label for label, _ in labelled(runs)]
    summaries = [summary(run) for run in runs]
    final = [(name, [_text(values[name]) for values in summaries]) for name in summaries[0]]
    differences = config_differences(runs)
    picture = base64.b64encode(_png(curves(runs, panels=len(PANELS)))).decode()
    parts = [
        "<h1>" + html.escape(", ".join(labels)) + "</h1>",
        "<h2>Final numbers</h2>",
        _table(labels, final),
        "<h2>Settings that differ</h2>" if len(runs) > 1 else "",
        _table(labels, differences) if differences else "",
        "<p>None.</p>" if len(runs) > 1 and not differences else "",
        "<h2>Curves</h2>",
        f'<img alt="curves" src="data:image/png;base64,{picture}">',
        "<h2>Configuration</h2>",
        _table(labels, [(k, [_text(r.config.get(k)) for r in runs]) for k in runs[0].config]),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>megalr report</title>'
        f"<style>{STYLE}</style></head><body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )
    _save(output, page.encode())


def _table(labels: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text) for text in ("", *labels))
    body = (
        f"<tr>{cell('th', name)}{''.join(cell('td', value) for value in values)}</tr>"
        for name, values in rows
    )
    return f"<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>"


def main() -> None:
    """Parse the command line, read the runs, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--output", type=Path, required=True, help="NAME.html (everything) or NAME.png (curves)"
    )
    arguments = parser.parse_args()
    writers = {".html": write_html, ".png": write_png}
    writer = writers.get(arguments.output.suffix)
    if writer is None:
        raise UserError(f"--output {arguments.output}: must end in {' or '.join(writers)}")
    runs = [read_run(folder) for folder in arguments.runs]
    writer(runs, arguments.output)
    for label, run in labelled(runs):
        print(f"{label}: {perplexity_change(run)}")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    exit_cleanly(main)
