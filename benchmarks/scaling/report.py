"""Tables and plot of the scaling model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.errors import UserError
from megalr.estimate.memory import GIB
from megalr.files import write_atomic

if TYPE_CHECKING:
    from scaling.choices import Choice

BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
RESTART_EVERY, SAVE_EVERY = 200, 1000
"""Updates between refactorizations, and between checkpoints."""

PARTS = (
    ("compute", "blocks and head"),
    ("optimizer", "gradients and optimizer"),
    ("tensor", "tensor-parallel messages"),
    ("data", "data-parallel messages"),
    ("overhead", "launching"),
)
COLUMNS = (
    "GPUs",
    "TP",
    "ZeRO",
    "micro-batch x number",
    "ms an update",
    "tokens/s",
    "speed of a GPU, of that of 8",
    "optimizer %",
    "TP %",
    "DP %",
    "GiB",
    "refactorize s (%)",
    "checkpoint s (%)",
    "loader ms",
)
SIZES = {"llama_1b": "1B", "llama_7b": "7B", "llama_13b": "13B"}
COLOURS = ("#2a78d6", "#1baf7a", "#eda100", "#e34948", "#4a3aa7")


def tables(choices: Sequence[Choice]) -> str:
    """Markdown: every low-rank prediction in full, and the methods beside each other."""
    lines = []
    for preset in dict.fromkeys(choice.preset for choice in choices):
        rows = [c for c in choices if c.preset == preset and c.method == "low_rank"]
        lines += [
            f"**{SIZES[preset]} low-rank, r {rows[0].job.method.rank}**",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * len(COLUMNS),
        ]
        lines += [_row(choice, rows[0]) for choice in rows]
        lines.append("")
    return "\n".join([*lines, *_methods(choices)]) + "\n"


def _row(choice: Choice, first: Choice) -> str:
    job, time = choice.job, choice.time
    total = time.total
    layout = (
        f"{job.plan.mesh.tensor_size} {job.plan.layout}" if job.plan.mesh.tensor_size > 1 else "1"
    )
    recomputed = ", recomputed" if job.recompute != "none" else ""
    cells = [
        f"{job.gpus:,}",
        layout,
        str(job.stage),
        f"{job.micro_batch} x {job.accumulation}{recomputed}",
        f"{1000 * total:,.0f}",
        f"{job.tokens / total / 1e6:.2f} M",
        f"{100 * choice.rate / first.rate:.0f} %",
        *(f"{100 * part / total:.1f}" for part in (time.optimizer, time.tensor, time.data)),
        f"{choice.memory / GIB:.0f}",
        f"{choice.refactorize:.2f} ({100 * choice.refactorize / RESTART_EVERY / total:.2f})",
        f"{choice.checkpoint:.1f} ({100 * choice.checkpoint / SAVE_EVERY / total:.2f})",
        f"{1000 * choice.loading:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _methods(choices: Sequence[Choice]) -> list[str]:
    """Tokens a second and GPU of the methods, at four sizes of the cluster."""
    sizes = sorted({choice.job.gpus for choice in choices})
    shown = sizes[:: max(1, len(sizes) // 3)]
    lines = [
        "**Tokens/s of one GPU**",
        "",
        "| | " + " | ".join(f"{gpus:,} GPUs" for gpus in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for preset in dict.fromkeys(choice.preset for choice in choices):
        for method in dict.fromkeys(choice.method for choice in choices):
            rates = {c.job.gpus: c for c in choices if (c.preset, c.method) == (preset, method)}
            cells = " | ".join(
                f"{rates[gpus].rate:,.0f} (TP {rates[gpus].job.plan.mesh.tensor_size})"
                for gpus in shown
            )
            lines.append(f"| {SIZES[preset]} {method} | {cells} |")
    return lines


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        UserError: the page or a mark is missing.
    """
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in old or END not in old:
        raise UserError(f"{page} has no lines {BEGIN} and {END}: nothing was written")
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    write_atomic(page, f"{before}{BEGIN}\n\n{text}\n{END}{after}".encode())


def draw(choices: Sequence[Choice], path: Path) -> None:
    """SVG: speed of a GPU by method above, where the time of a low-rank update goes below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets = list(dict.fromkeys(choice.preset for choice in choices))
    with pyplot.rc_context({"svg.hashsalt": "megalr", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(
            2, len(presets), figsize=(4 * len(presets), 6.5), sharex=True
        )
        for (upper, lower), preset in zip(axes.T, presets, strict=True):
            mine = [choice for choice in choices if choice.preset == preset]
            for number, method in enumerate(dict.fromkeys(c.method for c in mine)):
                rows = [c for c in mine if c.method == method]
                rates = [c.rate / 1000 for c in rows]
                colour = COLOURS[number]
                upper.plot([c.job.gpus for c in rows], rates, "o-", ms=3, label=method, c=colour)
            rows = [c for c in mine if c.method == "low_rank"]
            gpus = [c.job.gpus for c in rows]
            shares = [[100 * getattr(c.time, p) / c.time.total for c in rows] for p, _ in PARTS]
            lower.stackplot(gpus, shares, labels=[label for _, label in PARTS], colors=COLOURS)
            upper.set_title(SIZES[preset])
            upper.set_ylim(0)
            lower.set_ylim(0, 100)
            lower.set_xscale("log", base=2)
            lower.set_xticks(gpus, [f"{n:,}" for n in gpus], rotation=60)
            lower.set_xlabel("GPUs")
        axes[0][0].set_ylabel("thousand tokens/s of one GPU")
        axes[1][0].set_ylabel("% of a low-rank update")
        axes[0][-1].legend(frameon=False)
        axes[1][-1].legend(frameon=True, loc="lower left", fontsize=7)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
