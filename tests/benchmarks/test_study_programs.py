"""The study's programs on tiny runs: factors in checkpoints, failures and what checks did."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalr.checkpoint import open_checkpoint
from megalr.data.opening import open_validation_data
from megalr.errors import UserError
from megalr.run.metrics_reader import Run
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "study"))

import collect  # noqa: E402
import conditioning  # noqa: E402
import failures  # noqa: E402
import masks  # noqa: E402

RESTARTS = {"refactorize_every": 3}
SHORT = {"updates": 4, "global_batch_size": 4, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of four updates with a checkpoint after each: without and with refactorization."""
    home = tmp_path_factory.mktemp("runs")
    for name, restarts in (("none", {}), ("refactorization", RESTARTS)):
        every = {"every": 1, "keep_last": 9}
        values = settings(home / name, data, train=SHORT, restarts=restarts, checkpoint=every)
        run_distributed(run, 1, values, zero(1))
    return [home / "none", home / "refactorization"]


def test_numbers_of_the_factors_are_those_of_the_matrix(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, figure = tmp_path / "table.csv", tmp_path / "figure.svg"
    words = ["conditioning.py", *map(str, runs), "--csv", str(target), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", words)
    conditioning.main()
    rows = list(csv.DictReader(target.open(encoding="utf-8")))
    assert len(rows) == 2 * 4 * 7 and b"<svg" in figure.read_bytes()
    checkpoint = open_checkpoint(runs[1], "update_2")
    found = next(r for r in rows if (r["run"], r["update"], r["kind"]) == (runs[1].name, "2", "o"))
    values, imbalances = [], []
    for layer in range(2):
        prefix = f"layers.{layer}.attention.o"
        b = checkpoint.parameter(f"{prefix}.b").detach().double().numpy()
        a = checkpoint.parameter(f"{prefix}.a").detach().double().numpy()
        values.append(np.linalg.svd(2.0 * b @ a)[1][:8])  # alpha / rank is 16 / 8
        norms = np.linalg.norm(b.T @ b) + np.linalg.norm(a @ a.T)
        imbalances.append(np.linalg.norm(b.T @ b - a @ a.T) / norms)
    shares = [v / v.sum() for v in values]
    ranks = [math.exp(-(s * np.log(s)).sum()) for s in shares]
    assert float(found["largest"]) == pytest.approx(np.max(values), rel=1e-9)
    assert float(found["smallest"]) == pytest.approx(np.min(values), rel=1e-6)
    assert float(found["effective_rank"]) == pytest.approx(np.mean(ranks), rel=1e-9)
    assert float(found["imbalance"]) == pytest.approx(max(imbalances), rel=1e-9)
    balanced = [
        float(r["imbalance"]) for r in rows if r["run"] == runs[1].name and r["update"] == "3"
    ]
    assert max(balanced) < 1e-5 < min(float(r["imbalance"]) for r in rows if r["run"] == "none")


def test_runs_without_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoints: train with checkpoint\.every"):
        conditioning.rows_of_run(tmp_path)


def test_runs_are_evaluated_both_ways_and_once(
    runs: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "masks.csv"
    monkeypatch.setattr(masks, "start_distributed", lambda: torch.device("cpu"))

    def call(*given: Path) -> list[dict[str, str]]:
        words = ["masks.py", *map(str, given), "--csv", str(target), "--data", str(data)]
        monkeypatch.setattr(sys, "argv", words)
        masks.main()
        return list(csv.DictReader(target.open(encoding="utf-8")))

    (first,) = call(runs[0])
    held_out = open_validation_data([data], sequence_length=24)
    ends = open_validation_data([data], sequence_length=24, document_mask=True)
    for way, dataset in (("without masks", held_out), ("with masks", ends)):
        targets = int(dataset.count_targets(np.arange(dataset.num_samples)).sum())
        assert int(first[f"{data.name} {way}, targets"]) == targets
    assert held_out.num_samples == ends.num_samples
    last = events(runs[0], "eval")[-1]
    alone, apart = (float(first[f"{data.name} {way}"]) for way in masks.WAYS)
    assert alone == pytest.approx(last["perplexity"], rel=1e-6) != apart

    evaluated: list[str] = []
    of_run = masks.row_of_run

    def counted(run: Path, *given: Any) -> dict[str, Any]:
        evaluated.append(run.name)
        return of_run(run, *given)

    monkeypatch.setattr(masks, "row_of_run", counted)
    both = call(*runs)
    assert both[0] == first and evaluated == [runs[1].name] and len(both) == 2


def test_masks_are_compared_by_means_over_seeds() -> None:
    folder = Path("c4")
    rows = [
        {"run": f"low__masks=with__seed={seed}", "c4 without masks": 10 + seed, "c4 with masks": 9}
        for seed in (1, 3)
    ]
    *_, line = masks.table(rows, [folder]).splitlines()
    assert line == "| low__masks=with | 12.0 ± 1.4 | 9.0 ± 0.0 | 2 |"


def test_failures_are_counted_and_the_rise_behind_a_restart_is_measured() -> None:
    steps = [{"event": "step", "update": u, "loss": loss} for u, loss in enumerate((5, 4, 3), 1)]
    behind = [{"event": "step", "update": u, "loss": loss} for u, loss in ((4, 3.5), (5, 7.25))]
    others = [{"event": kind, "update": 5} for kind in ("spike", "spike", "rollback")]
    start = {"event": "start", "update": 0, "parameters": 17_600_000}
    last = {"event": "eval", "update": 5, "loss": 7.0, "perplexity": 1096.63}
    restart = {"event": "restart", "update": 3}
    found = Run("r", Path("r"), {}, (start, *steps, restart, *behind, *others, last))
    (_, _, line) = failures.table([found]).splitlines()
    # a rollback without a number of updates left nothing behind
    assert line == "| r | 5 | 1096.6 | 17.6 | 4.25 | 2 | 0 | 0 | 1 |"
    lost = Run("r", Path("r"), {}, (*steps, restart, {**behind[0], "loss": None}))
    assert failures.rise_after_restarts(lost) == math.inf
    assert failures.rise_after_restarts(Run("r", Path("r"), {}, tuple(steps))) is None


@pytest.mark.parametrize(
    ("row", "c4", "mix"),
    [
        ({"perplexity": "9.5"}, "9.5", None),
        ({"perplexity": "9.5", "perplexity_c4": "9.5", "perplexity_mix": "7"}, "9.5", "7"),
        ({"perplexity": "7", "perplexity_mix": "7"}, None, "7"),
    ],
)
def test_both_kinds_of_validation_are_collected(row: dict, c4: str | None, mix: str | None) -> None:
    sweep = {"optimizer": "adamw", "version": "v", "axis_lr": "1e-3", "axis_updates": "5", **row}
    given = collect.argparse.Namespace(study="s", size="20M", per_gpu=1, commit=None)
    found = collect.study_row(sweep, given)
    assert (found["perplexity_c4"], found["perplexity_mix"]) == (c4, mix)
    assert found["setting"] == "updates=5"  # tells runs apart that differ in this axis alone
    other = collect.study_row({**sweep, "axis_updates": "20"}, given)
    assert collect.merge([found], [other]) == [found, other]
