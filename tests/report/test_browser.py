"""The page in a real browser: no errors, nothing loaded, every control does what it says."""

from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from megalr.report.collect import collect_runs
from megalr.report.page import write_page
from tests.report.runs import make_long_run, make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(NAMES)} is installed")
PLOTS = [
    *("loss", "perplexity", "learning_rate", "gradient_norm", "tokens_per_second"),
    *("peak_memory_gib", "imbalance", "effective_rank", "spectrum"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_long_run(folder / "runs" / "a<script>alert(1)", level=2.0)
    make_long_run(folder / "runs" / "b", level=3.0, lr=2e-3)
    write_page(collect_runs([folder / "runs"]), folder / "report.html")
    return folder / "report.html"


class Shown:
    """A page in a window; what went wrong in it, and what it asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#chart-loss .js-plotly-plot .trace")

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def plot(self, name: str, what: str) -> Any:
        """A member of a plot: its ``data`` or ``layout``."""
        self.page.locator(f"#chart-{name}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#chart-{name}[data-drawn=yes] .js-plotly-plot")
        path = f"document.querySelector('#chart-{name} .plot').{what}"
        return json.loads(self.page.evaluate(f"JSON.stringify({path})"))

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that the page does by itself."""
        for _ in range(200):
            if reached():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("not reached in 10 s")

    def curve(self, name: str, label: str) -> tuple[list[float], list[float]]:
        """x and y of a run's curve."""
        (trace,) = [t for t in self.plot(name, "data") if t["name"] == label and "text" in t]
        return trace["x"], trace["y"]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (400, "light"),
        (1280, "dark"),
        pytest.param(400, "dark", marks=pytest.mark.long),
        pytest.param(1280, "light", marks=pytest.mark.long),
    ],
)
def test_all_plots_are_drawn_without_errors_and_fit(
    browser: Any, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    with Shown(browser, report, width, scheme) as shown:
        for name in PLOTS:
            assert shown.plot(name, "data")
            paths = shown.page.locator(f"#chart-{name} .trace path.js-line")
            lines = [paths.nth(place).get_attribute("d") for place in range(paths.count())]
            assert len(lines) >= (7 if name == "spectrum" else 2), name
            assert all(line and line.startswith("M") and "NaN" not in line for line in lines)
        assert shown.page.evaluate("document.documentElement.scrollWidth") == width
        outside = shown.page.evaluate(
            "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .chips')"
            " && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"
        )
        assert outside == []
        background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, background[4:-1].split(","))) > 600
        assert light == (scheme == "light")
        picture = shown.page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert len(picture) > 50_000
        assert shown.wrong == []
        assert shown.requests == [report.as_uri()]


def test_axis_changes_to_tokens_and_to_hours_of_running(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        updates, losses = shown.curve("loss", "b")
        assert updates == list(range(4, 396, 4))
        assert losses == pytest.approx([3.0 + 4.0 / update for update in updates], rel=1e-5)
        shown.page.select_option("#axis", "tokens")
        assert shown.curve("loss", "b")[0] == pytest.approx([512 * u for u in updates])
        shown.page.select_option("#axis", "hours")
        expected = [0.1 + 0.01 * u + 0.1 * (u > 200) for u in updates]
        assert shown.curve("loss", "b")[0] == pytest.approx(expected, abs=0.002)
        assert shown.plot("perplexity", "layout")["xaxis"]["title"]["text"] == "hours of running"
        assert shown.wrong == []


def test_smoothing_is_the_exponential_moving_average(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        _, raw = shown.curve("gradient_norm", "b")
        shown.page.locator("#smooth").fill("0.9")
        _, smooth = shown.curve("gradient_norm", "b")
        assert smooth == pytest.approx(pandas.Series(raw).ewm(alpha=0.1).mean().tolist(), rel=1e-9)
        assert shown.curve("perplexity", "b")[1] == pytest.approx(
            [2.7 ** (3.0 + 4.0 / u) for u in range(40, 361, 40)], rel=1e-5
        )


def test_log_switches(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        assert shown.plot("loss", "layout")["yaxis"]["type"] == "linear"
        shown.page.locator("#chart-loss input.log").check()
        axis = shown.plot("loss", "layout")["yaxis"]
        assert axis["type"] == "log"
        assert axis["range"][0] < math.log10(2.01) and axis["range"][1] > math.log10(4.0)
        assert shown.plot("perplexity", "layout")["xaxis"]["type"] == "linear"
        shown.page.locator("#log-axis").check()
        assert shown.plot("perplexity", "layout")["xaxis"]["type"] == "log"
        assert shown.wrong == []


def test_dragging_zooms_every_plot_and_double_click_resets(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        whole = shown.plot("loss", "layout")["yaxis"]["range"]
        box = shown.page.locator("#chart-loss .nsewdrag").first.bounding_box()
        middle = box["y"] + box["height"] / 2
        shown.page.mouse.move(box["x"] + box["width"] * 0.5, middle)
        shown.page.mouse.down()
        shown.page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=5)
        shown.page.mouse.up()
        shown.until(lambda: shown.plot("loss", "layout")["xaxis"]["range"][0] > 0)
        zoomed = shown.plot("loss", "layout")
        left, right = zoomed["xaxis"]["range"]
        assert 150 < left < 250 < right < 350
        assert zoomed["yaxis"]["range"][1] < whole[1]  # around what is visible
        speed = shown.plot("tokens_per_second", "layout")
        assert speed["xaxis"]["range"] == [left, right]
        shown.page.locator("#chart-loss .nsewdrag").first.dblclick()
        shown.until(lambda: shown.plot("loss", "layout")["xaxis"]["range"][0] == 0)
        assert shown.plot("loss", "layout")["yaxis"]["range"] == pytest.approx(whole)


def test_hovering_shows_values_and_events(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        box = shown.page.locator("#chart-loss .nsewdrag").first.bounding_box()
        shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        shown.page.wait_for_selector("#chart-loss .hoverlayer text")
        said = shown.page.locator("#chart-loss .hoverlayer").text_content()
        assert "a<script>alert(1)" in said and "b" in said and "update" in said
    kinds = {trace["name"] for trace in _traces(browser, report)}
    assert {"restart", "resume", "rollback"} <= kinds


def _traces(browser: Any, report: Path) -> list[dict[str, Any]]:
    with Shown(browser, report) as shown:
        with_marks = shown.plot("loss", "data")
        shown.page.locator("#marks").uncheck()
        without = shown.plot("loss", "data")
        assert len(without) == 2
        return with_marks


def test_chips_hide_runs_and_headings_sort(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        shown.page.locator("#chips button", has_text="b").last.click()
        assert {t["name"] for t in shown.plot("learning_rate", "data")} == {
            "a&lt;script&gt;alert(1)"
        }
        shown.page.locator("[data-show=all]").click()
        assert len(shown.plot("learning_rate", "data")) == 2
        first = shown.page.locator("#ranking tbody tr").first
        assert first.get_attribute("class") == "best"
        heading = shown.page.locator("#ranking th.sort", has_text="lr")
        heading.click()
        heading.click()
        assert shown.page.locator("#ranking tbody tr").first.locator("th").inner_text() == "b"


@pytest.mark.parametrize("ending", [pytest.param("png", marks=pytest.mark.long), "svg"])
def test_plots_can_be_saved(browser: Any, report: Path, tmp_path: Path, ending: str) -> None:
    with Shown(browser, report) as shown:
        with shown.page.expect_download() as download:
            shown.page.locator(f"#chart-perplexity [data-image={ending}]").click()
        assert download.value.suggested_filename == f"perplexity.{ending}"
        download.value.save_as(tmp_path / "saved")
        content = (tmp_path / "saved").read_bytes()
        if ending == "png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
        else:
            texts = " ".join(ElementTree.fromstring(content).itertext())
            assert "Validation perplexity" in texts and "a<script>alert(1)" in texts
        assert shown.wrong == []


def test_plots_without_curves_say_why(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        assert shown.plot("loss", "layout")["annotations"] == []
        shown.page.locator("[data-show=none]").click()
        (said,) = shown.plot("loss", "layout")["annotations"]
        assert said["text"] == "no run is chosen"
        assert shown.wrong == []


def test_theme_button_changes_page_and_plots(browser: Any, report: Path) -> None:
    with Shown(browser, report) as shown:
        light = shown.plot("loss", "layout")["paper_bgcolor"]
        shown.page.locator("#theme").click()
        assert shown.plot("loss", "layout")["paper_bgcolor"] != light


@pytest.mark.long
def test_many_long_runs_open_and_can_all_be_shown(browser: Any, tmp_path: Path) -> None:
    for number in range(120):
        losses = tuple(9.0 - 0.001 * number - 0.005 * point for point in range(1500))
        make_run(tmp_path / "runs" / f"run{number:03}", rank=number, losses=losses)
    write_page(collect_runs([tmp_path / "runs"]), tmp_path / "report.html")
    with Shown(browser, tmp_path / "report.html") as shown:
        lines = [trace for trace in shown.plot("loss", "data") if "text" in trace]
        assert len([trace for trace in lines if len(trace["x"]) > 1]) == 10
        assert shown.page.locator("#marks-note").inner_text() == ""
        shown.page.locator("[data-show=all]").click()
        traces = [t for t in shown.plot("loss", "data") if len(t["x"]) > 1]
        assert len(traces) == 120 and all(len(trace["x"]) <= 500 for trace in traces)
        assert shown.page.evaluate("document.documentElement.scrollWidth") == 1280
        assert shown.wrong == []
