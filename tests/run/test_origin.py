"""Where a start begins: not at a folder that holds something else, nor at other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import RankFailed, run_distributed
from tests.synthetic import write_dataset
from tests.training.runs import run, settings, zero


def test_what_does_not_belong_together_is_refused_and_left_alone(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data)
    run_distributed(run, 2, values, zero(1))
    before = (folder / "metrics.jsonl").read_bytes()

    changed = settings(folder, data, optimizer={"lr": 0.02}, log={"every": 2})
    with pytest.raises(RankFailed, match=r"optimizer.lr: 0.01 there, 0.02 here") as failure:
        run_distributed(run, 2, changed, zero(1))
    assert "log.every:" not in str(failure.value)
    with pytest.raises(RankFailed, match=r"run.resume is never"):
        run_distributed(run, 1, settings(folder, data, run={"resume": "never"}), zero(1))
    with pytest.raises(RankFailed, match=r"no finished checkpoint and run.resume is must"):
        empty = settings(tmp_path / "empty", data, run={"resume": "must"})
        run_distributed(run, 1, empty, zero(1))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("not a run")
    with pytest.raises(RankFailed, match=r"is not empty and holds no config.yaml"):
        run_distributed(run, 1, settings(foreign, data), zero(1))
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]

    other = write_dataset(tmp_path / "other", seed=1)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(data), str(other)))
    with pytest.raises(RankFailed, match="was trained on other data"):
        run_distributed(run, 2, settings(folder, other), zero(1))
    assert (folder / "metrics.jsonl").read_bytes() == before
