"""Steps run once, in order; the quickstart trains on the user's text from one command."""

from __future__ import annotations

import gzip
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from quickstart import PROMPT, Step, continued, parse_arguments, run_steps, run_steps_of_both

from megalr.errors import UserError

ROOT = Path(__file__).parents[2]


def copy_step(name: str, source: Path, target: Path, record: Path) -> Step:
    """A step that copies a file and notes that it ran."""
    program = (
        f"open({str(target)!r}, 'w').write(open({str(source)!r}).read()); "
        f"open({str(record)!r}, 'a').write({name!r} + ' ')"
    )
    return Step(name, ["python", "-c", program], [target], [source])


def test_a_step_runs_again_only_when_its_input_output_command_or_predecessor_changed(
    tmp_path: Path,
) -> None:
    a, b, c, log = (tmp_path / name for name in ("a", "b", "c", "log"))
    a.write_text("1")
    log.write_text("")
    steps = [copy_step("first", a, b, log), copy_step("second", b, c, log)]

    def ran() -> list[str]:
        log.write_text("")
        run_steps(steps, tmp_path / "records", {"python": sys.executable})
        return log.read_text().split()

    assert ran() == ["first", "second"]
    assert ran() == []
    a.write_text("22")
    assert ran() == ["first", "second"] and c.read_text() == "22"
    c.unlink()
    assert ran() == ["second"]
    (tmp_path / "records" / "first.json").write_text("damaged")
    assert ran() == ["first", "second"]
    steps[1] = copy_step("second", a, c, log)
    assert ran() == ["second"]


def test_failing_steps_stop_with_their_command_and_are_not_recorded(tmp_path: Path) -> None:
    programs = {"python": sys.executable}
    failing = Step("bad", ["python", "-c", "raise SystemExit(3)"], [])
    with pytest.raises(UserError, match=r"bad failed with exit code 3: python -c"):
        run_steps([failing], tmp_path, programs)
    empty = Step("idle", ["python", "-c", "pass"], [tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"idle did not make .*nothing"):
        run_steps([empty], tmp_path, programs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--input", "a.json", "b.json", "restarts.every=100", "data.train=x"],
        ["restarts.every=100", "data.train=x", "--input", "a.json", "b.json"],
        ["restarts.every=100", "--input", "a.json", "b.json", "data.train=x", "--folder", "out"],
        ["--input", "a.json", "b.json", "restarts.every=100", "--output", "out", "data.train=x"],
    ],
)
def test_settings_are_no_input_wherever_they_stand(words: list[str]) -> None:
    arguments = parse_arguments(words)
    assert arguments.input == ["a.json", "b.json"]
    assert arguments.overrides == ["restarts.every=100", "data.train=x"]


def test_a_file_with_a_name_like_a_setting_is_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b=c.jsonl").touch()
    assert parse_arguments(["--input", "a.b=c.jsonl"]).input == ["a.b=c.jsonl"]
    with pytest.raises(UserError, match=r"--input restarts\.every=100: names no file"):
        parse_arguments(["--input", "restarts.every=100"])


def test_make_gives_the_settings_and_the_input_to_the_quickstart() -> None:
    settings = "ARGS=restarts.every=100 data.packing=no"
    command = ["make", "-n", "quickstart", "INPUT=f*.gz more/*.jsonl", settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    # Under `make test` it also prints the folders that it enters and leaves.
    (line,) = (line for line in done.stdout.splitlines() if "tools/quickstart.py" in line)
    words = shlex.split(line)[2:]
    arguments = parse_arguments(words)
    assert arguments.input == ["f*.gz", "more/*.jsonl"]
    assert arguments.overrides == ["restarts.every=100", "data.packing=no"]


def test_the_two_runs_differ_in_restarts_only(tmp_path: Path) -> None:
    given = ["optimizer.lr=1e-3", "restarts.every=50"]
    plain, restarts = run_steps_of_both(tmp_path, False, given)
    assert set(restarts.command) - {*plain.command, *restarts.passing} == {
        f"run.dir={tmp_path}/runs/restarts",
        "restarts.every=25",
        "restarts.every=50",
    }
    assert restarts.command[-1] == "restarts.every=50"  # the last of a key wins
    assert plain.command[-1] == "optimizer.lr=1e-3"


def write_text(path: Path, documents: int) -> None:
    """Sentences with enough different words for a vocabulary of 8192 pieces."""
    choose = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "or")]
    words = ["".join(choose.choices(syllables, k=choose.randint(1, 4))) for _ in range(20_000)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(choose.choices(words, k=100))}) + "\n")


@pytest.mark.long
def test_quickstart_on_own_text_ends_with_a_report_and_a_second_time_does_nothing(
    tmp_path: Path,
) -> None:
    write_text(tmp_path / "own.json.gz", 3000)
    command = [
        sys.executable,
        "tools/quickstart.py",
        "--input",
        str(tmp_path / "*.json.gz"),
        "--folder",
        str(tmp_path / "out"),
        "train.updates=3",
        "restarts.every=2",
        "schedule.warmup_updates=1",
        "evaluation.every=1",
        "evaluation.tokens=512",
        "data.sequence_length=32",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "deepspeed --num_gpus" in first.stdout and "validation perplexity" in first.stdout
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    runs = tmp_path / "out" / "runs"
    files = [runs / name / "metrics.jsonl" for name in ("plain", "restarts")]
    events = [file.read_text().splitlines() for file in files]
    kinds = [{json.loads(line)["event"] for line in lines} for lines in events]
    assert "restart" not in kinds[0] and {"restart", "end"} <= kinds[1]
    sample = continued(tmp_path / "out" / "model", PROMPT)
    assert sample.startswith(PROMPT) and f"sample: {sample}" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("there already") == 7 and "done in" not in second.stdout
    assert [file.read_text().splitlines() for file in files] == events
