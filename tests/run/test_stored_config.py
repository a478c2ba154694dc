"""A run is continued and evaluated from any working folder by its own folder alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalr.config.schema import RunConfig
from megalr.engine.config import read_deepspeed_json, reopened, resolve_deepspeed_config
from megalr.errors import UserError
from megalr.run.folder import check_run_folder, stored_config, working_directory, write_run_folder
from tests.ranks import ON_THE_CPU
from tests.synthetic import write_dataset
from tests.training.runs import events, losses, settings, zero
from tests.warm import start_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY = {"train": {"updates": 4}, "evaluation": {"every": 0}, "checkpoint": {"every": 2}}


def _config(**data: object) -> RunConfig:
    return RunConfig.model_validate(settings(Path("runs/a"), Path("data/c4"), data=data))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, in which a run was started with relative paths; the cwd is another."""
    folder = tmp_path / "project"
    for name in ("c4", "v", "w"):
        (folder / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    write_run_folder(_config(train=["data/c4", "data/gone"], validation={"v": "data/v"}), {})
    (folder / "runs/a/metrics.jsonl").write_text('{"event": "step", "update": 1}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_paths_of_a_stored_configuration_lead_where_they_led(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path("../project/runs/a")
    config = stored_config(run, ["log.every=7", "run.resume=must"])
    assert [source.path for source in config.data.train] == [
        str(project / "data/c4"),
        str(project / "data/gone"),
    ]
    assert config.data.validation == {"v": (str(project / "data/v"),)}
    assert (config.run.dir, config.run.resume, config.log.every) == (str(run), "must", 7)
    assert stored_config(run, []).run.resume == "auto"
    assert check_run_folder(stored_config(run, [])) == []  # the same folders, written differently

    # Overrides start from this working directory.
    (Path.cwd() / "other").mkdir()
    changed = stored_config(run, ["data.train=other", "data.validation.w=data/w"])
    assert [source.path for source in changed.data.train] == ["other"]
    assert changed.data.validation == {"v": ("data/v",), "w": ("data/w",)}
    with pytest.raises(UserError, match=r"data\.train: .*data/gone.* there, .*other.* here"):
        check_run_folder(changed)
    assert [key for key, _, _ in check_run_folder(changed, ["data.*"])] == ["data.train"]

    monkeypatch.chdir(project)  # in the run's own working directory all stays as written
    assert [s.path for s in stored_config(Path("runs/a"), []).data.train] == [
        "data/c4",
        "data/gone",
    ]


def test_a_run_moved_with_its_data_and_one_of_an_older_version_are_found(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project / "runs/a/config.yaml"
    config.write_text(config.read_text().split("\n", 1)[1])  # no working directory recorded
    assert stored_config(project / "runs/a", []).data.train[0].path == str(project / "data/c4")
    monkeypatch.chdir(project)
    write_run_folder(_config(), {})
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert stored_config(Path("runs/a"), []).data.train[0].path == "data/c4"
    assert check_run_folder(stored_config(Path("runs/a"), [])) == []


def test_a_folder_without_a_run_and_a_run_dir_of_its_own_are_one_line(project: Path) -> None:
    with pytest.raises(UserError, match=r"--resume nowhere: holds no config\.yaml: give the fol"):
        stored_config(Path("nowhere"), [])
    with pytest.raises(UserError, match=r"run\.dir is given with --resume .*leave it out"):
        stored_config(project / "runs/a", ["run.dir=b"])
    with pytest.raises(UserError, match=r"log\.evry = 3: unknown key; did you mean log\.every"):
        stored_config(project / "runs/a", ["log.evry=3"])


@pytest.mark.parametrize("precision", ["bf16", "paper_bf16", "fp32"])
@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("ds_configs/*.json")))
def test_the_stored_deepspeed_json_serves_as_given_on_other_ranks(
    name: str, precision: str, tmp_path: Path
) -> None:
    """What it gives on other ranks and micro-batches is what the user's own file gives there."""
    user = read_deepspeed_json(ROOT / "ds_configs" / name)
    train = {"precision": precision, "micro_batch_size": 2}
    config = RunConfig.model_validate(settings(tmp_path, tmp_path, train=train))
    smaller = RunConfig.model_validate(
        settings(tmp_path, tmp_path, train={**train, "micro_batch_size": 1})
    )
    try:
        resolved = resolve_deepspeed_config(config, user, name, 3)
    except UserError:
        pytest.skip("not for this precision")
    stored = json.loads(json.dumps(resolved))
    assert resolve_deepspeed_config(config, stored, name, 3) == resolved
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        resolve_deepspeed_config(config, stored, name, 1)
    for ranks in (1, 2, 3):
        ours = resolve_deepspeed_config(smaller, reopened(stored), name, ranks)
        assert ours == resolve_deepspeed_config(smaller, user, name, ranks)


def _program(where: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=where,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ON_THE_CPU},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_processes_elsewhere_resume_and_evaluate_a_run_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_dataset(project / "data" / "c4")
    values = settings(Path("runs/a"), Path("data/c4"), **TINY)
    (project / "run.yaml").write_text(yaml.safe_dump(values))
    (project / "zero2.json").write_text(json.dumps(zero(2, reduce_bucket_size=1000)))
    monkeypatch.chdir(project)
    given = ["--config", "run.yaml", "--deepspeed_config", "zero2.json"]
    job = start_ranks(tmp_path / "first", given)
    assert job.wait() == [0, 0], job.output()
    run = project / "runs" / "a"
    unbroken = losses(run)
    shutil.rmtree(run / "checkpoints" / "update_4")

    monkeypatch.chdir(elsewhere)
    for number, ranks in enumerate((2, 1)):  # the second time on another number of ranks
        job = start_ranks(tmp_path / str(number), ["--resume", "../project/runs/a"], ranks)
        assert job.wait() == [0] * ranks, job.output()
        stored = json.loads((run / "ds_config.json").read_text())
        assert stored["zero_optimization"]["stage"] == 2
        assert stored["zero_optimization"]["reduce_bucket_size"] == 1000
        assert working_directory(run) == elsewhere
        assert losses(run) == pytest.approx(unbroken, abs=0 if ranks == 2 else 1e-5)
        shutil.rmtree(run / "checkpoints" / "update_4")
    assert [event["update"] for event in events(run, "resume")] == [2, 2]
    (tmp_path / "third").mkdir()
    evaluate = ("--run", str(run), "--tag", "update_2", "--split", "train", "--tokens", "500")
    found = json.loads(_program(tmp_path / "third", str(ROOT / "launchers/evaluate.py"), *evaluate))
    assert found["update"] == 2 and found["data"] == [str(project / "data/c4")]
