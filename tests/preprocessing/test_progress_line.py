"""The live line of a job."""

from __future__ import annotations

import io

import pytest

from megalr.preprocessing import progress_line as progress
from megalr.preprocessing.progress_line import ProgressLine
from megalr.preprocessing.split_pool import Throttle


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_shows_rates_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(files=4, input_bytes=10_000, stream=stream)
    line.finish_split(2_000, reused=True)
    now[0] += 10
    line.add(50, 3_000_000, 800_000, 2_000)
    assert stream.getvalue() == ""  # no terminal: a line every 30 s only
    now[0] += 30
    line.add(50, 3_000_000, 800_000, 2_000)
    line.finish_split(4_000, reused=False)
    assert stream.getvalue() == (
        "1/4 files, 100 documents (2/s), 6 MB (0.1/s), 1,600,000 tokens (0.04 M/s), "
        "0:00:40 elapsed, 0:00:40 left\n"
    )


def test_a_terminal_gets_one_line_that_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = _Terminal()
    line = ProgressLine(files=1, input_bytes=100, stream=stream)
    for _ in range(3):
        now[0] += 1
        line.add(1, 1, 1, 1)
    assert stream.getvalue().count("\r") == 3 and "\n" not in stream.getvalue()
    line.message("note")
    assert stream.getvalue().endswith("\r\x1b[Knote\n")


def test_counts_of_a_worker_are_added_up_between_two_messages() -> None:
    sent: list[list[int]] = []
    throttle = Throttle(sent.append)
    for _ in range(5):
        throttle(1, 2, 3, 4)
    throttle.flush()
    throttle.flush()
    assert sent == [[5, 10, 15, 20]]
