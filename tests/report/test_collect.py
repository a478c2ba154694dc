"""Runs are found, compared and summarized; what is damaged is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.report.collect import (
    as_text,
    collect_runs,
    config_differences,
    end_of,
    final_numbers,
    labelled,
)
from megalr.report.curves import drawn_charts
from megalr.report.marks import marks_of
from megalr.report.page import data_of, write_page
from megalr.report.ranking import ranked
from megalr.run.metrics_reader import perplexity_change, read_run
from tests.damage import mutated_bytes, mutated_json
from tests.report.runs import make_long_run, make_run, write_events


def test_final_numbers_and_perplexity_change(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a"))
    numbers = final_numbers(run)
    assert numbers["updates"] == 30 and numbers["training tokens"] == 3000
    assert numbers["training loss"] == 4.0 and numbers["restarts"] == 1
    assert numbers["tokens per second (median)"] == 100.0
    assert numbers["refactorization time (s)"] == 0.5
    assert perplexity_change(run) == ("validation perplexity 100.0 after 10 updates, 33.3 after 30")


def test_repeated_updates_of_a_resumed_run_count_once_and_the_newest_wins(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "step", "update": 20, "loss": 4.5, "tokens": 2}) + "\n")
        file.write('{"event": "step", "upd')
    steps = read_run(folder).series("step")
    assert [(step["update"], step["loss"]) for step in steps] == [(10, 6.0), (20, 4.5), (30, 4.0)]


@pytest.mark.parametrize(
    "back", [{"event": "start", "update": 10}, {"event": "rollback", "update": 30, "to_update": 10}]
)
def test_updates_that_a_run_went_back_over_do_not_count(
    tmp_path: Path, back: dict[str, Any]
) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(back) + "\n")
        file.write(json.dumps({"event": "step", "update": 20, "loss": 4.5, "tokens": 2}) + "\n")
    run = read_run(folder)
    assert [(e["update"], e["loss"]) for e in run.series("step")] == [(10, 6.0), (20, 4.5)]
    assert [e["update"] for e in run.series("eval")] == [10]
    assert final_numbers(run)["updates"] == 20


def test_the_end_is_that_of_the_newest_start(tmp_path: Path) -> None:
    events = [json.loads(line) for line in _lines(make_run(tmp_path / "a"))]
    events.append({"event": "end", "update": 30, "reason": "SIGTERM"})
    write_events(tmp_path / "a", events)
    assert end_of(read_run(tmp_path / "a")) == "SIGTERM"
    write_events(tmp_path / "a", [*events, {"event": "start", "update": 30}])
    assert end_of(read_run(tmp_path / "a")) == "not yet"


def _lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_a_folder_stands_for_the_runs_below_it_each_once(tmp_path: Path) -> None:
    for name in ("a", "deep/b", "deep/c"):
        make_run(tmp_path / name)
    make_run(tmp_path / "a" / "inside")  # part of run a, not a run of its own
    empty = tmp_path / "deep" / "started"
    make_run(empty)
    write_events(empty, [])
    found = collect_runs([tmp_path / "a", tmp_path])
    assert [run.name for run in found.runs] == ["a", "b", "c"]
    (said,) = found.unreadable
    assert said == f"{empty}/metrics.jsonl: no update was logged yet"


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no run folder: no metrics.jsonl in it or in a"):
        collect_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"absent: no run folder: cannot read metrics.jsonl"):
        collect_runs([tmp_path / "absent"])
    write_events(make_run(tmp_path / "x" / "a"), [])
    with pytest.raises(UserError, match=r"x: no run below it can be read: .* no update was logged"):
        collect_runs([tmp_path / "x"])


def test_runs_of_the_same_name_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / x / "run", rank) for x, rank in (("a", 8), ("b", 16))]
    paths.append(make_run(tmp_path / "other"))
    labels = [label for label, _ in labelled([read_run(path) for path in paths])]
    assert labels == ["a/run", "b/run", "other"]


def test_settings_that_differ_are_listed_but_not_the_folders(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a", 8, changes={"run.dir": "x", "data.train": None})),
        read_run(make_run(tmp_path / "b", 16, changes={"run.dir": "y"})),
    ]
    assert config_differences(runs) == [("method.rank", ["8", "16"])]


def test_values_become_cells() -> None:
    values = [None, True, 12345, 0.00123456, 23456.7, math.inf, [1, None], {"a": 1.5}, "x"]
    cells = ["—", "true", "12,345", "0.001235", "23,457", "inf", "1, —", "a 1.5", "x"]
    assert [as_text(value) for value in values] == cells


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
    found = read_run(folder)
    assert found == expected and found.skipped_lines == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}:2: no event of a run, skipped: ")


def test_many_bad_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("nonsense\n" * 1000)
    assert read_run(folder).skipped_lines == 1000
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 6 and warnings[-1].endswith("995 more lines skipped")
    write_page(collect_runs([folder]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1,000 damaged lines of its metrics are skipped" in page


def _all_of_a_report(folder: Path) -> None:
    rows = ranked([read_run(folder), read_run(folder)])
    runs = [run for _, run in rows]
    json.dumps(data_of(rows, drawn_charts(runs)[0]), allow_nan=False)
    for run in runs:
        marks_of(run)
        final_numbers(run)
        perplexity_change(run)
    config_differences(runs)


def test_mutated_metrics_never_raise_anything_but_a_user_error(tmp_path: Path) -> None:
    """Bytes flipped, removed and doubled at fixed random places."""
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    random = Random(17)
    for _ in range(300):
        path.write_bytes(mutated_bytes(whole, random.randrange(2**32)))
        try:
            _all_of_a_report(folder)
        except UserError as error:
            assert "\n" not in str(error)


def test_events_of_any_values_are_shown_or_skipped(tmp_path: Path) -> None:
    """Valid JSON with values exchanged, as no version of megalr writes it."""
    folder = make_long_run(tmp_path / "a", updates=240)
    events = [json.loads(line) for line in _lines(folder)]
    some = [e for e in events if e["event"] != "step"] + events[:3]
    for seed in range(200):
        (folder / "metrics.jsonl").write_text(
            "".join(
                json.dumps(mutated_json(event, 100 * seed + place)) + "\n"
                for place, event in enumerate(some)
            )
        )
        try:
            _all_of_a_report(folder)
        except UserError as error:
            assert "\n" not in str(error)
