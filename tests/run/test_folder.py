"""Whose a run's folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.run.folder import check_run_folder, has_updates, write_run_folder
from megalr.run.metrics_writer import MetricsWriter
from tests.training.runs import settings


def _config(folder: Path, rate: float) -> RunConfig:
    return RunConfig.model_validate(settings(folder, Path("data"), optimizer={"lr": rate}))


def test_a_run_that_ended_before_its_first_update_leaves_its_folder_to_another(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    write_run_folder(_config(folder, 0.01), {})
    other = _config(folder, 0.02)
    assert not has_updates(folder) and check_run_folder(other) == []
    with MetricsWriter(folder, True, 10, tensorboard=False, wandb_project=None, config={}) as file:
        file.write("start", 0)
        assert not has_updates(folder) and check_run_folder(other) == []
        file.write("step", 1, loss=2.5)
    assert has_updates(folder)
    with pytest.raises(UserError, match=r"optimizer.lr: 0.01 there, 0.02 here"):
        check_run_folder(other)
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints" / "update_1").mkdir()
    (folder / "checkpoints" / "update_1" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"optimizer.lr: 0.01 there, 0.02 here"):
        check_run_folder(other)


def test_folders_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    values = settings(Path("~/runs/a"), Path("~/c4"), data={"validation": ["~/v", "w/~x"]})
    config = RunConfig.model_validate(values)
    assert config.run.dir == "/home/somebody/runs/a"
    assert config.data.train[0].path == "/home/somebody/c4"
    assert config.data.validation == ("/home/somebody/v", "w/~x")
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
