"""Reports read run folders whole or cut off, show the numbers in them, and name what is damaged."""

from __future__ import annotations

import base64
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.lines import Line2D
from report import config_differences, curves, summary, write_html, write_png

from megalr.errors import UserError
from megalr.run.metrics_reader import perplexity_change, read_run
from tests.damage import mutated_bytes

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder: Path, rank: int = 8, losses: tuple[float, ...] = (6.0, 5.0, 4.0)) -> Path:
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"event": "start", "update": 0, "model": "llama_9m", "method": "low_rank", "world_size": 2}
    ]
    for number, loss in enumerate(losses, start=1):
        step = {"loss": loss, "tokens": 1000 * number, "tokens_per_second": 50.0 * number}
        events.append({"event": "step", "update": 10 * number, "mfu": "n/a", **step})
        events.append(
            {"event": "eval", "update": 10 * number, "loss": loss, "perplexity": 100.0 / number}
        )
    events.append({"event": "restart", "update": 20, "refactorize_seconds": 0.5})
    write_events(folder, events)
    config = {"method": {"name": "low_rank", "rank": rank}, "run": {"seed": 42}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def write_events(folder: Path, events: list[dict[str, Any]], tail: str = "") -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def test_final_numbers_and_perplexity_change(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a"))
    numbers = summary(run)
    assert numbers["updates"] == 30 and numbers["training tokens"] == 3000
    assert numbers["training loss"] == 4.0 and numbers["restarts"] == 1
    assert numbers["tokens per second (median)"] == 100.0
    assert numbers["refactorization time (s)"] == 0.5
    assert perplexity_change(run) == ("validation perplexity 100.0 after 10 updates, 33.3 after 30")


def test_repeated_updates_of_a_resumed_run_count_once_and_the_newest_wins(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "resume", "update": 10}) + "\n")
        file.write(json.dumps({"event": "step", "update": 20, "loss": 4.5, "tokens": 2}) + "\n")
        file.write('{"event": "step", "upd')
    steps = read_run(folder).series("step")
    assert [(step["update"], step["loss"]) for step in steps] == [(10, 6.0), (20, 4.5), (30, 4.0)]


def points_of(line: Line2D) -> list[list[float]]:
    return np.column_stack(line.get_data()).tolist()


def test_curves_hold_the_logged_points_of_every_run(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", 16, (3.0, 2.0)))]
    loss, perplexity = curves(runs).axes
    drawn = [points_of(line) for line in loss.lines if str(line.get_label())[0] != "_"]
    assert drawn == [[[10, 6], [20, 5], [30, 4]], [[10, 3], [20, 2]]]
    assert loss.get_legend_handles_labels()[1] == ["a", "b"]
    drawn = [points_of(line) for line in perplexity.lines]
    assert drawn == [[[10, 100], [20, 50], [30, 100 / 3]], [[10, 100], [20, 50]]]


def test_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a<b", 8)), read_run(make_run(tmp_path / "c", 16))]
    assert config_differences(runs) == [("method.rank", ["8", "16"])]
    write_html(runs, tmp_path / "deep" / "report.html")
    page = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "a&lt;b" in page and "a<b" not in page
    assert "<tr><th>method.rank</th><td>8</td><td>16</td></tr>" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1 and base64.b64decode(pictures[0]).startswith(PNG)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path,
) -> None:
    run = read_run(make_run(tmp_path / "a"))
    page = tmp_path / "report.html"
    page.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"report.html: cannot write \(File too large\)"):
            write_html([run], page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]
    write_html([run], tmp_path / ("x" * 240 + ".html"))
    with pytest.raises(UserError, match="name is too long"):
        write_html([run], tmp_path / ("x" * 260 + ".html"))


def test_runs_of_the_same_name_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / x / "run", rank)) for x, rank in (("a", 8), ("b", 16))]
    write_html(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<th>{tmp_path}/a/run</th><th>{tmp_path}/b/run</th>" in page


def test_nothing_but_one_point_or_infinite_values_still_gives_a_picture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    write_events(folder, [{"event": "step", "update": 1, "loss": float("nan"), "tokens": 5}])
    run = read_run(folder)
    write_png([run], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert perplexity_change(run) == "no evaluation"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no run folder: cannot read metrics.jsonl: No such file"),
        ("", "no update was logged yet"),
        ('{"event": "start", "update": 0}\n', "no update was logged yet"),
        ('{"event": "step"}\n\n', "no update was logged yet"),
    ],
)
def test_damaged_metrics_are_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_run(folder)


BAD_LINES = [
    "nonsense",
    "",
    "[]",
    "{}",
    '{"event": "step"}',
    '{"event": "step", "update": "1"}',
    '{"event": "step", "update": true}',
    '{"event": "step", "update": -1}',
    '{"event": "step", "update": 1.5}',
    '{"event": 5, "update": 1}',
    '{"event": "step", "update": 1, "loss": "low"}',
    '{"event": "step", "update": 1, "tokens": 1e300}',
    '{"event": "step", "update": 1, "tokens_per_second": []}',
    '{"event": "restart", "update": 1, "refactorize_seconds": null}',
    '{"event": "eval", "update": 1, "loss": 2.0}',
    '{"event": "eval", "update": 1, "loss": 2.0, "perplexity": "7"}',
    '{"event": "step", "update": 1, "x": ' + "[" * 5000 + "}",
    '{"event": "step", "update": 1, "x": ' + "9" * 5000 + "}",
    '{"event": "step", "update": 1',
]


@pytest.mark.parametrize("line", [*(text.encode() for text in BAD_LINES), b'{"event": "\xff"}'])
def test_a_bad_line_is_skipped_and_named(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a")
    expected = read_run(folder)
    path = folder / "metrics.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + b"\n" + rest)
    assert read_run(folder) == expected
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}:2: no event of a run, skipped: ")
    write_html([read_run(folder)], tmp_path / "report.html")


def test_many_bad_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("nonsense\n" * 1000)
    read_run(folder)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 6 and warnings[-1].endswith("995 more lines skipped")


def test_mutated_metrics_never_raise_anything_but_a_user_error(tmp_path: Path) -> None:
    """Bytes flipped, removed and doubled at fixed random places."""
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    random = Random(17)
    for _ in range(300):
        path.write_bytes(mutated_bytes(whole, random.randrange(2**32)))
        try:
            run = read_run(folder)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        summary(run)
        perplexity_change(run)
        config_differences([run, run])


def test_command_line_writes_both_kinds_and_refuses_others(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(folder), "--output"]

    def run(output: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(tmp_path / output)], capture_output=True, text=True, cwd=ROOT
        )

    done = run("x.html")
    assert done.returncode == 0, done.stderr
    assert "a: validation perplexity 100.0 after 10 updates, 33.3 after 30" in done.stdout
    refused = run("x.pdf")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --output") and len(refused.stderr.splitlines()) == 1
