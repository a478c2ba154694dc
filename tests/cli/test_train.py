"""``megalr train``: the ranks it starts, what stops them, and when it is itself a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megalr.cli import train
from megalr.cli.main import main
from megalr.errors import UserError
from tests.ranks import run_distributed
from tests.synthetic import write_dataset
from tests.training.runs import events, losses, run, settings, zero

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


def start(tmp_path: Path, config: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a folder that is not the checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "megalr.cli.main", "train", "--config", str(config), *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_two_ranks_train_as_under_another_launcher_and_stop_together_when_asked(
    data: Path, tmp_path: Path
) -> None:
    values = settings(tmp_path / "here", data, evaluation={"every": 0})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    run_distributed(run, 2, settings(tmp_path / "there", data, evaluation={"every": 0}), zero(1))
    longer = ["train.updates=10", "train.updates=100000", "checkpoint.every=0"]
    output = start(tmp_path, config, "--gpus", "2").communicate(timeout=300)[0]
    assert "no GPU is visible: 2 processes on the CPU" in output
    assert events(tmp_path / "here", "start")[0]["world_size"] == 2, output
    assert losses(tmp_path / "here") == losses(tmp_path / "there")

    folder = tmp_path / "long"
    words = ["--gpus=2", f"run.dir={folder}", *longer]
    process = start(tmp_path, config, *words)
    while not (folder / "metrics.jsonl").exists() or len(events(folder, "step")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 75, output
    (end,) = events(folder, "end")
    assert end["reason"] == "SIGTERM"
    assert (folder / "checkpoints" / f"update_{end['updates']}" / "manifest.json").exists()


def test_a_mistake_is_one_line_and_exit_code_2_from_all_ranks(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "run", data)))
    process = start(tmp_path, config, "train.updatess=3", "--gpus", "2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "did you mean train.updates?" in line and "Traceback" not in output


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What would be started, or ["rank"] for a rank in this process; nothing is."""
    found: list[object] = []
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_NUM_NODES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train.StopRequest, "listen", lambda self: self)
    monkeypatch.setattr(train, "_rank", lambda *_: found.append("rank") or 0)
    monkeypatch.setattr(train, "start_ranks", lambda *given: found.append(given) or 3)
    monkeypatch.setattr("megalr.distributed.local_ranks.visible_gpus", lambda: ["4", "7"])
    return found


def test_a_process_per_gpu_is_started_unless_one_will_do(
    started: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_it = ["train", "--config", "llama_9m"]
    program = [str(ROOT / "launchers" / "pretrain.py"), "--config", "llama_9m"]
    assert main(run_it) == 3  # the exit code of the ranks
    main([*run_it, "--gpus", "2", "run.seed=3"])
    main([*run_it, "--gpus", "1"])
    main([*run_it, "--gpus", "7,"])
    main([*run_it, "--print_config"])
    train.pretrain_command(run_it[1:])
    train.pretrain_command([*run_it[1:], "--gpus", "7,4"])
    assert started == [
        (program, 2, []),
        ([*program, "run.seed=3"], 2, []),
        (program, 1, ["4"]),
        (program, 1, ["7"]),
        "rank",
        "rank",
        (program, 2, ["7", "4"]),
    ]
    started.clear()
    monkeypatch.setattr("megalr.distributed.local_ranks.visible_gpus", lambda: ["0"])
    main(run_it)
    monkeypatch.setattr("megalr.distributed.local_ranks.visible_gpus", lambda: [])
    main(run_it)
    main([*run_it, "--gpus", "2"])
    assert started == ["rank", "rank", (program, 2, [])]


def test_a_launchers_rank_starts_nothing(
    started: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    main(["train", "--config", "llama_9m"])
    assert started == ["rank"]
    with pytest.raises(UserError, match="--gpus under a launcher has no effect"):
        main(["train", "--config", "llama_9m", "--gpus", "2"])


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {"SLURM_JOB_NUM_NODES": "2"}, "this SLURM job has 2 nodes: put srun before"),
        (["--gpus", "3"], {}, "--gpus is 3: this machine has 2 that torch can use"),
        (["--gpus", "5,6"], {}, "--gpus names '5': give each GPU once; this machine has 4, 7"),
        (["--resume", "runs/x"], {}, "--config and --resume are both given"),
    ],
)
def test_mistakes_before_anything_starts(
    words: list[str],
    variables: dict[str, str],
    message: str,
    started: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        main(["train", "--config", "llama_9m", *words])
    assert started == []
