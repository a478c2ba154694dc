"""PNG and SVG hold the logged points; the command line writes what its options ask for."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from megalr.errors import UserError
from megalr.report.figures import draw_overview, write_figures, write_overview
from megalr.run.metrics_reader import perplexity_change, read_run
from tests.report.runs import make_long_run, make_run, write_events

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def points_of(line: Line2D) -> list[list[float]]:
    return np.column_stack(line.get_data()).tolist()


def test_curves_hold_the_logged_points_of_every_run(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", 16, (3.0, 2.0)))]
    loss, perplexity = draw_overview(runs).axes
    drawn = [points_of(line) for line in loss.lines if str(line.get_label())[0] != "_"]
    assert drawn == [[[10, 6], [20, 5], [30, 4]], [[10, 3], [20, 2]]]
    assert loss.get_legend_handles_labels()[1] == ["a", "b"]
    assert sum(points_of(line) == [[20, 0], [20, 1]] for line in loss.lines) == 2  # restarts
    drawn = [points_of(line) for line in perplexity.lines]
    assert drawn == [[[10, 100], [20, 50], [30, 100 / 3]], [[10, 100], [20, 50]]]


def test_every_chart_is_written_in_both_formats_the_same_each_time(tmp_path: Path) -> None:
    runs = [read_run(make_long_run(tmp_path / "_a$x$")), read_run(make_run(tmp_path / "b"))]
    written = write_figures(runs, tmp_path / "figures")
    assert {path.stem for path in written} == {
        *("loss", "perplexity", "learning_rate", "gradient_norm", "tokens_per_second"),
        *("peak_memory_gib", "imbalance", "effective_rank"),
    }
    assert len(written) == 16
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    again = write_figures(runs, tmp_path / "again")
    for first, second in zip(written, again, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_nothing_but_one_point_or_infinite_values_still_gives_a_picture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    write_events(folder, [{"event": "step", "update": 1, "loss": float("nan"), "tokens": 5}])
    run = read_run(folder)
    write_overview([run], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert perplexity_change(run) == "no evaluation"


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(make_run(tmp_path / "a"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"need matplotlib, .*: pip install matplotlib"):
        write_overview([run], tmp_path / "x.png")


def _command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_command_line_writes_all_kinds_and_refuses_others(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "a")
    done = _command(tmp_path / "runs", "--output", tmp_path / "x.html", "--figures", tmp_path / "f")
    assert done.returncode == 0, done.stderr
    assert "a: validation perplexity 100.0 after 10 updates, 33.3 after 30" in done.stdout
    assert (tmp_path / "x.html").stat().st_size > 1e6
    assert (tmp_path / "f" / "loss.svg").is_file()
    done = _command(folder, "--output", tmp_path / "x.svg")
    assert done.returncode == 0, done.stderr
    assert ElementTree.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")
    refused = _command(folder, "--output", tmp_path / "x.pdf")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --output") and len(refused.stderr.splitlines()) == 1
