"""Singular values and balance of the factors in the checkpoints of runs, as CSV and figure.

    python benchmarks/study/conditioning.py sweeps/conditioning_20m/runs/* \\
        --csv benchmarks/results/study/conditioning_20m.csv --figure conditioning.svg

A line per checkpoint and kind of matrix (q, k, ...). Of W = (alpha/r) B A of rank r, in float64:

* singular values: the largest over the matrices of the kind, the median, the smallest;
* effective rank: mean over the matrices of exp(entropy of s / sum s), between 1 and r;
* imbalance: largest ||B'B - AA'|| / (||B'B|| + ||AA'||), 0 after a refactorization;
* condition_b, condition_a: median of the ratio of the factors' largest to smallest singular value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tables import svg_figure, write_svg

from megalr.errors import UserError, exit_cleanly
from megalr.hf.trained_run import load_decoder, open_verified
from megalr.layers.factors import FactorPair
from megalr.restarts.spectra import effective_rank
from megalr.sweep.results import Row, write_csv

COLUMNS = (
    *("run", "update", "kind", "matrices", "rank", "largest", "median", "smallest"),
    *("effective_rank", "imbalance", "condition_b", "condition_a"),
)
PANELS = {
    "imbalance": "imbalance of the factors (largest)",
    "effective_rank": "effective rank of W / r (mean)",
    "condition_b": "condition of B (largest kind)",
}
"""Columns that the figure shows, with the labels of their axes."""


def numbers_of(pair: FactorPair) -> tuple[torch.Tensor, float, float, float]:
    """Singular values ``(r,)`` of ``scale B A``, descending; imbalance; conditions of B and of A.

    W is never formed: with B = Q R and A' = Q' R', its singular values are those of scale R R'^T.
    """
    b = pair.b[slice(*pair.b_rows)].detach().double()  # (m, r)
    a = pair.a[slice(*pair.a_rows)].detach().double()  # (r, n)
    right, left = torch.linalg.qr(a.t()).R, torch.linalg.qr(b).R  # (r, r)
    values = torch.linalg.svdvals(left @ right.t()) * abs(pair.scale)
    gram_b, gram_a = b.t() @ b, a @ a.t()
    size = float(gram_b.norm() + gram_a.norm())
    imbalance = float((gram_b - gram_a).norm()) / size if size else 0.0
    return values, imbalance, _condition(left), _condition(right)


def _condition(matrix: torch.Tensor) -> float:
    s = torch.linalg.svdvals(matrix)
    return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


def rows_of_checkpoint(run: Path, tag: str) -> list[Row]:
    """One row per kind of matrix of a checkpoint.

    Raises:
        UserError: a damaged checkpoint, or a model without factors whose product is a matrix.
    """
    checkpoint = open_verified(run, tag)
    kinds: dict[str, list[FactorPair]] = {}
    for pair in load_decoder(run, checkpoint).factor_pairs():
        kinds.setdefault(pair.name.rsplit(".", 1)[-1], []).append(pair)
    if not kinds:
        raise UserError(f"{run}: its method has no factors whose product is a matrix: leave it out")
    rows = []
    for kind, pairs in kinds.items():
        found = [numbers_of(pair) for pair in pairs]
        values = torch.cat([one[0] for one in found])
        ranks = torch.stack([effective_rank(one[0]) for one in found])
        rows.append(
            {
                **{"run": run.name, "update": checkpoint.update, "kind": kind},
                **{"matrices": len(pairs), "rank": pairs[0].rank},
                "largest": float(values.max()),
                "median": float(values.median()),
                "smallest": float(values.min()),
                "effective_rank": float(ranks.mean()),
                "imbalance": max(one[1] for one in found),
                "condition_b": float(torch.tensor([one[2] for one in found]).median()),
                "condition_a": float(torch.tensor([one[3] for one in found]).median()),
            }
        )
    return rows


def rows_of_run(run: Path) -> list[Row]:
    """The rows of all checkpoints of a run, by update.

    Raises:
        UserError: it has no checkpoint, or as :func:`rows_of_checkpoint`.
    """
    tags = sorted(path.name for path in (run / "checkpoints").glob("update_*"))
    if not tags:
        raise UserError(f"{run}: holds no checkpoints: train with checkpoint.every and keep_last")
    rows = [row for tag in tags for row in rows_of_checkpoint(run, tag)]
    return sorted(rows, key=lambda row: row["update"])


def curve(rows: list[Row], column: str) -> tuple[list[int], list[float]]:
    """Updates, and over the kinds the largest value there; of the effective rank the mean share."""
    by_update: dict[int, list[float]] = {}
    for row in rows:
        share = row["rank"] if column == "effective_rank" else 1
        by_update.setdefault(row["update"], []).append(row[column] / share)
    mean = column == "effective_rank"
    return list(by_update), [sum(v) / len(v) if mean else max(v) for v in by_update.values()]


def draw(runs: dict[str, list[Row]], path: Path) -> None:
    """A panel per quantity, a line per run."""
    figure = svg_figure((10, 3.2))
    for axes, (column, label) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for name, rows in runs.items():
            axes.plot(*curve(rows, column), label=name, marker=".")
        axes.set_xlabel("updates")
        axes.set_title(label, fontsize=9)
        axes.set_yscale("log" if column == "condition_b" else "linear")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    write_svg(figure, path)


def main() -> None:
    """Read the checkpoints, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with checkpoints")
    parser.add_argument("--csv", type=Path, required=True, help="table to write")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    found = {run.resolve().name: rows_of_run(run.resolve()) for run in arguments.runs}
    write_csv(arguments.csv, COLUMNS, [row for rows in found.values() for row in rows])
    if arguments.figure is not None:
        draw(found, arguments.figure)
    for name, rows in found.items():
        last = [row for row in rows if row["update"] == rows[-1]["update"]]
        worst = max(row["imbalance"] for row in last)
        print(f"{name}: {len(rows)} rows, imbalance {worst:.2g} after update {last[0]['update']}")


if __name__ == "__main__":
    exit_cleanly(main)
