"""Whose a run's folder is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.files import replace_file, temporary_path
from megalr.run import folder as run_folder
from megalr.run.folder import (
    check_run_folder,
    has_updates,
    working_directory,
    write_run_folder,
)
from megalr.run.metrics_reader import read_run
from megalr.run.metrics_writer import MetricsWriter
from tests.damage import mutated_bytes
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
        file.write("signal", 0, signal="SIGTERM")
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


def test_a_start_killed_while_it_claims_the_folder_leaves_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its writes, by versions that made the folder of checkpoints first."""
    config = _config(tmp_path / "run", 0.01)
    calls = 0

    class Killed(BaseException):
        pass

    def die_at(last: int) -> Callable[..., None]:
        def write(path: Path, content: bytes, job: str = "single") -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                temporary_path(path, job).write_bytes(content[:3])
                raise Killed
            replace_file(path, content, job)

        return write

    for last in (1, 2):
        calls = 0
        monkeypatch.setattr(run_folder, "replace_file", die_at(last))
        with pytest.raises(Killed):
            write_run_folder(config, {})
        (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
        assert check_run_folder(config) == []
    (tmp_path / "run" / "config.yaml").unlink(missing_ok=True)
    (tmp_path / "run" / "ds_config.json").unlink(missing_ok=True)
    (tmp_path / "run" / "checkpoints" / "mine").mkdir()
    with pytest.raises(UserError, match=r"is not empty and holds no config\.yaml"):
        check_run_folder(config)


def test_a_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}/run cannot be read: Permission denied"):
        check_run_folder(_config(tmp_path / "run", 0.01))


HOSTILE = {
    "deep": "a: " + "[" * 5000,
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrst")),
    "large": "# " + "x" * 2_000_000,
    "bytes": "\udcff",
    "list": "- 1",
    "empty": "",
    "sections": "train: 5",
    "tag": "train: !!python/object/apply:os.mkdir [ran]",
    "date": "train: {updates: 2001-13-45}",
    "number": "train: {updates: " + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_that_no_run_wrote_is_one_line(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = _config(folder, 0.01)
    write_run_folder(config, {})
    (folder / "metrics.jsonl").write_text('{"event": "step", "update": 1}\n')
    assert check_run_folder(config) == []
    (folder / "config.yaml").write_text(HOSTILE[name], errors="surrogateescape")
    for read in (lambda: check_run_folder(config), lambda: read_run(folder)):
        with pytest.raises(UserError) as error:
            read()
        assert str(folder / "config.yaml") in str(error.value) and "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_mutated_configurations_are_compared_or_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = _config(folder, 0.01)
    write_run_folder(config, {})
    (folder / "metrics.jsonl").write_text('{"event": "step", "update": 1}\n')
    path = folder / "config.yaml"
    whole = path.read_bytes()
    random = Random(19)
    for _ in range(60):
        path.write_bytes(mutated_bytes(whole, random.randrange(2**32)))
        try:
            check_run_folder(config)
        except UserError as error:
            assert "\n" not in str(error)


def test_folders_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    values = settings(Path("~/runs/a"), Path("~/c4"), data={"validation": ["~/v", "w/~x"]})
    config = RunConfig.model_validate(values)
    assert config.run.dir == "/home/somebody/runs/a"
    assert config.data.train[0].path == "/home/somebody/c4"
    assert config.data.validation == ("/home/somebody/v", "w/~x")
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


def test_relative_paths_start_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / 'a "folder"'
    start.mkdir()
    monkeypatch.chdir(start)
    write_run_folder(_config(Path("runs/a"), 0.01), {})
    write_run_folder(_config(tmp_path / "absolute", 0.01), {})
    monkeypatch.chdir(tmp_path)
    assert working_directory(start / "runs/a") == start
    assert working_directory(tmp_path / "absolute") == start
    for folder, found in ((start / "runs/a", start), (tmp_path / "absolute", None)):
        config = folder / "config.yaml"  # as written by a version that did not record it
        config.write_text(config.read_text().split("\n", 1)[1])
        assert working_directory(folder) == found
    (start / "runs/a").rename(tmp_path / "moved")
    assert working_directory(tmp_path / "moved") is None
    assert working_directory(tmp_path / "nowhere") is None
