"""The program with real runs: its table holds the numbers of their metrics, and runs go on."""

from __future__ import annotations

import csv
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalr.cli.sweep import sweep_command
from megalr.errors import UserError
from tests.sweep.files import write_sweep
from tests.training.runs import events

ROOT = Path(__file__).parents[2]


def command(path: Path, output: Path, *more: str) -> list[str]:
    program = [sys.executable, str(ROOT / "tools" / "sweep.py"), str(path)]
    return [*program, "--output", str(output), *more]


def in_process(monkeypatch: pytest.MonkeyPatch, path: Path, output: Path, *more: str) -> int:
    """The program's exit code, without paying for a process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", command(path, output, *more)[1:])
    return sweep_command()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a sweep of two runs that finish and one that fails."""
    folder = tmp_path_factory.mktemp("sweep")
    groups = {
        "good": {"axes": {"lr": {"key": "optimizer.lr", "values": [0.01, 0.02]}}},
        "bad": {"set": ["model.vocab_size=64"]},  # the data have larger ids
    }
    sets = [f"data.train={data}", f"data.validation={{own: {data}, again: {data}}}"]
    path = write_sweep(folder, set=[*sets, "restarts.every=2"], groups=groups)
    done = subprocess.run(
        command(path, folder / "out", "--per_gpu", "2"), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("3 runs, 3 to do, 2 at a time\n")
    assert "bad__seed=7: failed (" in done.stdout
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    """What the table must hold, worked out from a run's metrics."""
    (start,), steps = events(folder, "start"), events(folder, "step")
    evaluations, (end,) = events(folder, "eval"), events(folder, "end")
    assert len(steps) == 3 and len(evaluations) == 2
    return {
        "updates": end["updates"],
        "tokens": sum(e["tokens_per_second"] * e["step_seconds"] for e in steps),
        "unique_tokens": min(steps[-1]["tokens"], start["train_tokens"]),
        "loss": evaluations[-1]["loss"],
        "perplexity": math.exp(evaluations[-1]["loss"]),
        "perplexity_own": math.exp(evaluations[-1]["loss"]),
        "perplexity_again": math.exp(events(folder, "eval_further")[-1]["loss"]),
        "best_perplexity": min(e["perplexity"] for e in evaluations),
        "parameters": start["parameters"],
        "peak_memory_gib": max(e["peak_memory_gib"] for e in steps),
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in steps),
        "gpu_seconds": end["train_seconds"],
    }


def test_the_table_holds_the_numbers_of_the_metrics(swept: Path) -> None:
    found = {row["run"]: row for row in rows(swept / "out" / "runs.csv")}
    assert list(found) == ["good__lr=0.01__seed=7", "good__lr=0.02__seed=7", "bad__seed=7"]
    for lr in ("0.01", "0.02"):
        name = f"good__lr={lr}__seed=7"
        own, folder = found[name], swept / "out" / "runs" / name
        for column, value in numbers(folder).items():
            assert float(own[column]) == pytest.approx(value, rel=2e-3), column
        config = (own["sweep"], own["group"], own["axis_lr"], own["seed"], own["status"])
        assert config == ("tiny", "good", lr, "7", "finished")
        assert [own[c] for c in ("method", "optimizer", "precision", "restarts", "rank")] == [
            *("low_rank", "adamw", "fp32", "every 2", "8")
        ]
        assert (own["alpha"], own["lr"], own["lr_ratio_head"], own["error"]) == (
            "16.0",
            lr,
            "1.0",
            "",
        )
        versions = events(folder, "start")[0]["versions"]
        assert own["gpu"] == versions["device"] and own["version"].endswith(versions["commit"])
    bad = found["bad__seed=7"]
    assert bad["status"] == "failed" and "64" in bad["error"]
    assert bad["perplexity"] == "" and bad["updates"] == "0"


def test_the_history_holds_every_evaluation_of_every_set(swept: Path) -> None:
    name = "good__lr=0.02__seed=7"
    found = [row for row in rows(swept / "out" / "history.csv") if row["run"] == name]
    folder = swept / "out" / "runs" / name
    steps = {step["update"]: step for step in events(folder, "step")}
    expected = [*events(folder, "eval"), *events(folder, "eval_further")]
    assert len(found) == len(expected) == 4
    for row, event in zip(found, expected, strict=True):
        update = event["update"]
        assert (int(row["update"]), row["validation"]) == (update, event["validation"])
        assert float(row["loss"]) == event["loss"]
        assert int(row["tokens"]) == steps[update]["tokens"]
        seconds = sum(steps[number]["step_seconds"] for number in range(1, update + 1))
        assert float(row["seconds"]) == pytest.approx(seconds, abs=1e-3)


def test_a_second_call_repeats_nothing(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (swept / "out" / "runs.csv").read_text()
    assert in_process(monkeypatch, swept / "tiny.yaml", swept / "out") == 1
    assert "3 runs, 0 to do" in capsys.readouterr().out
    assert (swept / "out" / "runs.csv").read_text() == before
    assert not (
        swept / "out" / "runs" / "good__lr=0.01__seed=7" / "checkpoints" / "latest"
    ).exists()


@pytest.mark.long
def test_a_stopped_sweep_goes_on_where_its_runs_were(data: Path, tmp_path: Path) -> None:
    sets = [f"data.train={data}", "train.updates=5000", "log.every=1", "evaluation.every=0"]
    path, out = write_sweep(tmp_path, set=sets, groups={"g": {}}), tmp_path / "out"
    folder = out / "runs" / "g__seed=7"
    first = subprocess.Popen(command(path, out), stdout=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists() or len(events(folder, "step")) < 3:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM: the same command goes on" in first.communicate()[0]
    assert first.returncode == 75
    (row,) = rows(out / "runs.csv")
    assert row["status"] == "pending" and int(row["updates"]) >= 3
    second = subprocess.Popen(command(path, out), stdout=subprocess.DEVNULL)
    while not events(folder, "resume"):
        assert second.poll() is None
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    assert second.wait() == 75
    (resumed,) = events(folder, "resume")
    assert resumed["update"] == int(row["updates"])


def test_mistakes_are_one_line_and_a_dry_run_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_sweep(tmp_path, groups={"a": {}, "b": {}, "d": {}}), tmp_path / "out"
    for more, message in (
        (["--only", "a*", "--only", "c*"], "--only c*: matches no run, such as a__seed=7"),
        (["--limit_minutes", "0"], "--limit_minutes is 0.0: give more than 0"),
        (["--start_minutes", "-1"], "--start_minutes is -1.0: give more than 0"),
        (["--slurm"], "--slurm needs --time"),
        (["--time", "1:00:00"], "--time without --slurm has no effect: remove it"),
        (["--collect", "--per_gpu", "2"], "--per_gpu with --slurm or --collect has no effect"),
        (["--extend", "--extend_limit", "0"], "--extend_limit is 0: give 1 or more"),
        (["data.train=gone"], "gone: no such folder of data (a__seed=7 needs it)"),
        (["train.updatess=3"], "a and 2 more: command line: train.updatess = 3: unknown key"),
    ):
        with pytest.raises(UserError) as caught:
            in_process(monkeypatch, path, out, *more)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    capsys.readouterr()
    assert in_process(monkeypatch, path, out, "--only", "d*", "--only", "b*", "--dry_run") == 0
    assert capsys.readouterr().out == "b__seed=7\nd__seed=7\n" and not out.exists()
