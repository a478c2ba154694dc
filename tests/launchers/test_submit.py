"""launchers/submit.py: the header it fills, and what it refuses before anything is queued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalr.cli.submit import TEMPLATE, submit_command
from megalr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/llama_60m.yaml"
FITS = ["train.micro_batch_size=16"]
LOW_RANK = ["method.name=low_rank", "method.rank=128"]
ZERO_3 = ["--deepspeed_config", "ds_configs/zero3.json"]
SIZE = ["--nodes", "4", "--gpus", "8", "--time", "1-12:00:00"]


def submit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["submit.py", RECIPE, *arguments])
    submit_command()


def test_dry_run_prints_a_script_with_this_header_and_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train.micro_batch_size=16", "run.dir=runs/my run"]
    more = ["--partition", "gpu", "--cpus", "12", "--launch", "torchrun", "--dry-run"]
    submit(monkeypatch, *SIZE, *more, "--deepspeed_config", "ds_configs/zero2.json", *run)
    script = capsys.readouterr().out
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    assert options == [
        "job-name=llama_60m",
        "nodes=4",
        "gpus-per-node=8",
        "ntasks-per-node=8",
        "cpus-per-task=12",
        "time=1-12:00:00",
        "signal=B:USR1@300",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
        "partition=gpu",
    ]
    # What bash makes of the head of the script, up to its first command.
    head = script[: script.index("set -uo pipefail")]
    shown = subprocess.run(
        ["bash", "-c", head + 'printf "%s\\n" "$LAUNCH" "$@"'],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = ["torchrun", "--config", RECIPE, "--deepspeed_config", "ds_configs/zero2.json", *run]
    assert shown.stdout.splitlines() == expected
    rest = TEMPLATE.read_text()[TEMPLATE.read_text().index("set -uo pipefail") :]
    assert script.endswith(rest)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*SIZE, "train.updatse=5"], "did you mean train.updates?"),
        (["--nodes", "3", *SIZE[2:]], "is no multiple of train.micro_batch_size 128 x 24"),
        (["--nodes", "0", *SIZE[2:]], "--nodes is 0: give 1 or more"),
        ([*SIZE[:4], "--time", "a day"], "--time is 'a day': give D-HH:MM:SS"),
        ([*SIZE, "--partition", "gpu low"], "--partition is 'gpu low'"),
        ([*SIZE, "parallel.tensor=5"], "parallel.tensor"),
        ([*SIZE, *FITS, "method.name=low_rank", "method.rank=600"], "method.rank 600 is larger"),
        ([*SIZE, *FITS, *LOW_RANK, "method.targets=[q,v]"], "targets names q, v but not k"),
        (
            [*SIZE, *FITS, *LOW_RANK, "parallel.tensor=4", "model.num_kv_heads=2"],
            "parallel.tensor 4 does not divide model.num_kv_heads 2",
        ),
        ([*SIZE, *FITS, *ZERO_3, "parallel.tensor=2"], "parallel.tensor 2 with ZeRO stage 3"),
        (
            [*SIZE, *FITS, "method.name=sltrain", "method.rank=8", "optimizer.name=muon"],
            "Muon needs matrices",
        ),
        ([*SIZE, "train.micro_batch_size=16"], "sbatch is not on PATH"),
    ],
)
def test_a_mistake_is_found_before_the_queue(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="(?s)" + message.replace("?", r"\?")):
        submit(monkeypatch, *arguments)


def test_a_recipe_is_found_by_name_and_options_may_be_spelled_with_dashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "qwen3_0.6b", "--deepspeed-config=zero2", "--dry-run", "data.train=/d"]
    submit_command([*SIZE, *words, "train.micro_batch_size=4"])
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=qwen3_0.6b\n" in script
    assert "set -- --config qwen3_0.6b --deepspeed_config zero2 data.train=/d train" in script


ORDER = 'touch "$HERE/ran"'
HOSTILE = [
    f"a\n{ORDER}",
    f"a\r\n{ORDER}\n#",
    f"$({ORDER})",
    f"`{ORDER}`",
    f"a; {ORDER}",
    f"'; {ORDER}; '",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_value_becomes_a_command_of_the_script(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of files and values of options; bash runs the script up to its first own command."""
    recipe = tmp_path / f"{text.replace('/', '%')}.yaml"
    recipe.write_text((ROOT / RECIPE).read_text())
    deepspeed = recipe.with_suffix(".json")
    deepspeed.write_text("{}")
    run = [f"run.dir={json.dumps(text)}", "train.micro_batch_size=16"]
    files = [str(recipe), "--deepspeed_config", str(deepspeed)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["submit.py", *files, *SIZE, "--dry-run", *run])
    submit_command()
    script = capsys.readouterr().out
    assert [line for line in script.split("\n") if line.startswith("#SBATCH --job-name=")]
    head = script[: script.index("set -uo pipefail")]
    shown = subprocess.run(
        ["bash", "-c", head + 'printf "%s\\0" "$@"'],
        capture_output=True,
        check=True,
        env={"HERE": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    given = ["--config", str(recipe), "--deepspeed_config", str(deepspeed), *run]
    assert shown.stdout.decode().split("\0")[:-1] == given
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["--name", "--log", "--partition", "--account", "--time"])
def test_a_value_of_the_header_is_one_word(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (*HOSTILE, "a\u2028b", "", "\u0661"):
        if option == "--time" or text != "\u0661":
            with pytest.raises(UserError, match=f"{option} is"):
                submit(monkeypatch, *SIZE, "--dry-run", option, text)


def test_a_name_that_is_not_utf_8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not UTF-8"):
        submit(monkeypatch, *SIZE, "--dry-run", "run.dir=\udcff")
