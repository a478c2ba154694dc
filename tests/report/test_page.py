"""The page is one file that loads nothing, holds the logged numbers, and shows texts as texts."""

from __future__ import annotations

import json
import re
import resource
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.report.collect import Collected, collect_runs
from megalr.report.page import write_page
from tests.report.runs import make_long_run, make_run


class _Page(HTMLParser):
    """Addresses, policy, tables as rows of cells, and the data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.metas: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.data = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.addresses += [
            given[name] for name in ("src", "href", "data", "action") if name in given
        ]
        if tag == "meta":
            name = given.get("name") or given.get("http-equiv") or "charset"
            self.metas[name] = given.get("content", "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._inside = "cell"
        if tag == "script":
            self._inside = "data" if given.get("id") == "data" else ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "script"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "cell":
            self.rows[-1][-1] += data
        if self._inside == "data":
            self.data += data

    def column(self, heading: str, of: str) -> list[str]:
        """A column of the table whose first heading is ``of`` and that has this column."""
        place = next(i for i, row in enumerate(self.rows) if row[0] == of and heading in row)
        column, found = self.rows[place].index(heading), []
        for row in self.rows[place + 1 :]:
            if row[0] == of or len(row) != len(self.rows[place]):
                break
            found.append(row[column])
        return found


def _report(tmp_path: Path, *folders: Path) -> _Page:
    write_page(collect_runs(folders), tmp_path / "deep" / "report.html")
    return _Page(tmp_path / "deep" / "report.html")


def test_page_loads_nothing_and_says_so_to_the_browser(tmp_path: Path) -> None:
    page = _report(tmp_path, make_long_run(tmp_path / "a"))
    assert page.addresses == []
    assert page.metas["Content-Security-Policy"].startswith("default-src 'none'")
    assert not re.search(r"https?:", page.metas["Content-Security-Policy"])
    assert page.metas["viewport"].startswith("width=device-width")
    css = (tmp_path / "deep" / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in css and "@import" not in css


def test_licence_of_the_library_is_in_the_page(tmp_path: Path) -> None:
    _report(tmp_path, make_run(tmp_path / "a"))
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"plotly\.js v\d.*?Licensed under the MIT license", text, re.DOTALL)


def test_names_and_values_are_shown_as_text(tmp_path: Path) -> None:
    bad = "a<script>alert(1)<!--"
    changes: dict[str, Any] = {"data.train": "</script><img src=http://x>&amp;"}
    page = _report(tmp_path, make_run(tmp_path / bad, changes=changes), make_run(tmp_path / "c"))
    assert page.addresses == []
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text.split("<script")[0]
    assert text.count("<script") == text.count("</script") == 3
    assert {run["label"] for run in json.loads(page.data)["runs"]} == {bad, "c"}
    assert set(page.column("method", of="run")) == {"low_rank"}
    assert ["data.train", "</script><img src=http://x>&amp;", "—"] in page.rows


def test_data_of_the_plots_are_the_logged_points(tmp_path: Path) -> None:
    page = _report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", 16, (3.0, 2.0)))
    runs = {run["label"]: run for run in json.loads(page.data)["runs"]}
    assert runs["a"]["curves"]["loss"] == {"x": [10, 20, 30], "y": [6.0, 5.0, 4.0]}
    assert runs["b"]["curves"]["perplexity"] == {"x": [10, 20], "y": [100.0, 50.0]}
    assert runs["b"]["clock"] == {"update": [0, 10, 20], "tokens": [0, 1000, 2000], "hours": None}
    assert [mark[:2] for mark in runs["a"]["marks"]] == [["restart", 20]]


def test_ranking_events_and_differing_settings_are_tables(tmp_path: Path) -> None:
    page = _report(tmp_path, make_long_run(tmp_path / "x", level=3.0), make_run(tmp_path / "b", 16))
    order = page.column("run", of="run")
    assert [cell.removeprefix("★ ") for cell in order[:2]] == ["x", "b"]
    assert order[0].startswith("★ ")
    assert page.column("tokens/s", of="run")[:2] == ["5000", "100"]
    assert page.column("perplexity, best", of="run")[1] == "33.33"
    assert page.column("rollback", of="run") == ["1", "0"]
    events = "restart restart resume restart restart rollback restart"
    assert page.column("event", of="run") == events.split()
    assert ["method.rank", "8", "16"] in page.rows


@pytest.mark.long
def test_many_runs_have_a_row_each_and_fewer_points(tmp_path: Path) -> None:
    for number in range(30):
        losses = tuple(9.0 - 0.002 * point for point in range(2500))
        make_run(tmp_path / f"run{number:02}", rank=number, losses=losses)
    page = _report(tmp_path, tmp_path)
    data = json.loads(page.data)
    assert len(data["runs"]) == 30 and data["most"] == 2000
    for run in data["runs"]:
        curve = run["curves"]["loss"]
        assert len(curve["x"]) <= 2000 and curve["x"][-1] == 25_000 and curve["y"][-1] == 4.002
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "Curves of 30 runs are thinned to 2,000 points each" in text
    assert "The 10 best of 30 runs are drawn at first." in text
    assert sorted(map(int, page.column("method.rank", of=""))) == list(range(30))


def test_runs_that_could_not_be_read_are_named(tmp_path: Path) -> None:
    found = collect_runs([make_run(tmp_path / "a")])
    write_page(Collected(found.runs, ("b/<i>: no update",)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<li>b/&lt;i&gt;: no update</li>" in text


def test_without_plotly_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = collect_runs([make_run(tmp_path / "a")])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(
        UserError, match=r"needs plotly, .*pip install 'megalr\[report\]'"
    ) as raised:
        write_page(runs, tmp_path / "report.html")
    assert "\n" not in str(raised.value) and not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    runs = collect_runs([make_run(tmp_path / "a")])
    page = tmp_path / "report.html"
    page.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"report.html: cannot write \(File too large\)"):
            write_page(runs, page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]
    write_page(runs, tmp_path / ("x" * 240 + ".html"))
    with pytest.raises(UserError, match="name is too long"):
        write_page(runs, tmp_path / ("x" * 260 + ".html"))
