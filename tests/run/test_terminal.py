"""What a run shows: at most 80 columns for any numbers, plain in a file, what to type next."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megalr.run import units
from megalr.run.event_lines import LINES, event_line
from megalr.run.terminal import Terminal, fitted
from tests.run.test_metrics_writer import documented

STEP = {
    "loss": 6.6704,
    "learning_rate": 0.00138,
    "tokens_per_second": 4102.4,
    "peak_memory_gib": 0.61,
    "eta_seconds": 48.3,
}
FACTS = {
    "model": "llama_60m",
    "method": "low_rank",
    "optimizer": "adamw",
    "parameters": 58_073_600,
    "trainable_parameters": 58_073_600,
    "world_size": 8,
    "tensor_parallel_size": 1,
    "layout": "none",
    "precision": "bf16",
    "zero_stage": 1,
    "train_tokens": 2_340_000_000,
    "vocab_size": 32128,
    "tokenizer_ids": 32100,
    "versions": {"device": "NVIDIA H200"},
}
CONFIG = {
    "train": {"global_batch_size": 512},
    "data": {"sequence_length": 256},
    "log": {"tensorboard": True},
}
EVENTS: dict[str, dict[str, Any]] = {
    "import": {"matrices": 56, "relative_error_mean": 0.1, "relative_error_max": 0.3}
    | {"import_seconds": 1e9},
    "resume": {"path": "checkpoints/update_100", "verify_seconds": 1.0, "load_seconds": 0.5}
    | {"reshaped": True, "damaged": ["update_120: " + "x" * 80], "unfinished": ["update_140"]}
    | {"allowed": [["train.updates", 60, 90]]},
    "fork": {"path": "runs/a/checkpoints/update_9", "state": "weights"}
    | {"changed": [["optimizer.lr", 0.01, 0.02], ["data.train", "x" * 80, "y"]]},
    "compile": {"compile_seconds": 83.0, "kernel_seconds": None},
    "eval": {"loss": 4.8155, "perplexity": 123.4},
    "eval_further": {"validation": "v" * 90, "loss": math.inf, "perplexity": math.inf},
    "restart": {"trigger": "period", "refactorized": True, "reset": True, "matrices": 56}
    | {"refactorize_seconds": 0.0312, "dead_directions": 0, "fraction_reset": 1.0},
    "merge": {"merged": True, "matrices": 10**9, "merge_seconds": 1e9, "reset": True}
    | {"fraction_reset": 0.99},
    "checkpoint": {"path": "checkpoints/update_1", "bytes": 10**18, "save_seconds": 1e9}
    | {"delete_error": "Permission denied: " + "x" * 80},
    "skip": {"reason": "non_finite", "batch": 10**9, "skipped_in_row": 10**9, "skipped": 10**9},
    "spike": {"of": "gradient_norm", "value": 1e300, "mean": 1e-300, "deviations": 1e9}
    | {"batch": 10**9, "action": "rollback"},
    "reset": {"fraction_reset": 1.0, "reason": "spike"},
    "rollback": {"to_update": 10**9, "batches_left_out": 10**9, "reason": "x" * 80},
}


def test_the_line_of_a_report() -> None:
    expected = "step  60/240    loss  6.670  lr 1.4e-3  4.10k tok/s    0.6 GiB  eta    0:48"
    assert event_line("step", 60, 240, STEP) == expected
    later = event_line("step", 240, 240, STEP | {"loss": 10.5, "tokens_per_second": 1.25e6})
    units_of = [[m.end() for m in re.finditer("tok/s|GiB|eta", x)] for x in (expected, later)]
    assert units_of[0] == units_of[1]


@pytest.mark.parametrize("total", [1, 240, 10**9])
@pytest.mark.parametrize("value", [0.0, 1e-300, 999.96, 123456.789, 1e300, math.nan, math.inf])
def test_a_report_of_any_numbers_fits_80_columns(total: int, value: float) -> None:
    line = event_line("step", total, total, dict.fromkeys(STEP, value))
    assert len(line) <= 80 and line.startswith(f"step {total}/{total} ")
    assert "loss" in line and "eta" in line


@pytest.mark.parametrize("event", EVENTS)
def test_other_events_fit_80_columns(event: str) -> None:
    (line,) = event_line(event, 10**9, 10**9, EVENTS[event]).splitlines()
    assert len(line) <= 80
    assert line.startswith(f"{event.removesuffix('_further')} 1000000000 ")


def test_every_documented_event_has_a_line() -> None:
    assert LINES.keys() | {"start", "step", "signal", "end"} == documented().keys()
    assert EVENTS.keys() == LINES.keys()


@pytest.mark.parametrize(
    "event, changed, expected",
    [
        ("restart", {}, "refactorized 56 pairs in 0.03 s, moments reset"),
        ("restart", {"dead_directions": 3, "reset": False}, "pairs in 0.03 s, 3 dead directions"),
        ("restart", {"refactorized": False, "fraction_reset": 0.9}, "90% of moments reset"),
        ("restart", {"trigger": "imbalance", "imbalance": 3.21}, "imbalance 3.2: refactorized"),
        ("restart", {"skipped_nonfinite": "head.weight"}, "not done, not finite: head.weight"),
        ("eval", {"validation": "c4"}, "c4 ppl 123.4 (loss 4.816)"),
        ("checkpoint", {"bytes": 431 * 1024, "save_seconds": 0.1, "delete_error": None}, "431 KiB"),
        ("fork", {}, "weights of runs/a/checkpoints/update_9, optimizer.lr 0.01 -> "),
        ("resume", {"damaged": [], "unfinished": []}, "train.updates 60 -> 90"),
    ],
)
def test_texts_of_events(event: str, changed: dict[str, Any], expected: str) -> None:
    assert expected in event_line(event, 200, 240, EVENTS[event] | changed)


def test_units() -> None:
    values = (0, 932, 999, 1000, 9_996, 58_073_600, 1_310_000_000, 999.6, 4.1, math.nan, -math.inf)
    shown = "0 932 999 1.00k 10.0k 58.1M 1.31B 1.00k 4.10 nan -inf"
    assert " ".join(map(units.compact, values)) == shown
    seconds = (0, 59.6, 3599.6, 3723, 359_999, 360_000, 1e9, math.inf)
    assert [units.clock(s) for s in seconds] == [
        *("0:00", "1:00", "1:00:00", "1:02:03", "99:59:59", "4d 04h", "11574d 01h", "?")
    ]
    assert [units.took(s) for s in (0.031, 9.999, 59.96)] == ["0.03 s", "10.0 s", "1:00"]
    assert units.binary_size(1023.9 * 2**20) == "1.00 GiB"
    assert [units.scientific(v) for v in (0, 0.00138, 1e-10)] == ["0", "1.4e-3", "1.0e-10"]
    assert [units.four_digits(v) for v in (32.4, 123.4, 1e6)] == ["32.40", "123.4", "1.000e6"]


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(out: io.StringIO, folder: Path, reason: str, world_size: int = 8) -> str:
    terminal = Terminal(out, folder, 240, CONFIG)
    terminal.show("start", 0, FACTS | {"world_size": world_size})
    terminal.show("step", 60, STEP)
    terminal.show("eval", 60, EVENTS["eval"])
    terminal.show("checkpoint", 60, EVENTS["checkpoint"] | {"path": "checkpoints/update_60"})
    terminal.show("signal", 60, {"signal": reason})
    terminal.show("end", 60, {"seconds": 65.0, "train_seconds": 60.0, "reason": reason})
    return out.getvalue()


def test_the_start_says_what_runs_where() -> None:
    text = _shown(io.StringIO(), Path("runs/x"), "finished")
    for expected in (
        "model     llama_60m, 58.1M parameters\n",
        "on        8 x NVIDIA H200, bf16, ZeRO 1\n",
        "update    131k tokens: 512 sequences of 256\n",
        "run       240 updates, 31.5M tokens; the data have 2.34B\n",
        "folder    runs/x\n",
        "watch     tensorboard --logdir runs/x\n",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert "note" not in text


def test_a_vocabulary_far_larger_than_the_tokenizer_s_is_mentioned() -> None:
    out = io.StringIO()
    facts = FACTS | {"vocab_size": 8192, "tokenizer_ids": 2048}
    Terminal(out, Path("runs/x"), 240, CONFIG).show("start", 0, facts)
    assert "note      most ids are unused: model.vocab_size=2048 would do\n" in out.getvalue()


def test_the_end_says_what_came_out_and_what_to_type_next() -> None:
    text = _shown(io.StringIO(), Path("runs/my run"), "finished")
    _, _, end = text.partition("finished  60 updates in 1:05, of which 1:00 training\n")
    assert end.splitlines() == [
        "ppl       123.4 (loss 4.816) after update 60",
        "folder    runs/my run",
        "next      megalr report 'runs/my run'",
        "          megalr export 'runs/my run' --output OUTPUT",
    ]


def test_a_stopped_run_says_what_was_saved_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["launchers/pretrain.py", "--config", "a b.yaml"])
    text = _shown(io.StringIO(), Path("runs/x"), "SIGINT", world_size=1)
    assert text.splitlines()[-3:] == [
        "stopped   after update 60 of 240 (SIGINT) in 1:05, of which 1:00 training",
        "saved     update 60 in runs/x/checkpoints/update_60",
        "to go on  python launchers/pretrain.py --config 'a b.yaml'",
    ]
    # Several ranks have a launcher, whose command line they do not know.
    assert _shown(io.StringIO(), Path("runs/x"), "SIGINT").endswith("to go on  the same command\n")
    out = io.StringIO()
    Terminal(out, Path("runs/x"), 240, CONFIG).show(
        "end", 0, {"seconds": 5.0, "train_seconds": 0.0, "reason": "SIGINT"}
    )
    assert "saved     nothing, since no update was made\n" in out.getvalue()


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    plain = _shown(io.StringIO(), Path("x"), "finished")
    coloured = _shown(_Tty(), Path("x"), "finished")
    assert "\x1b[32meval 60\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert _shown(_Tty(), Path("x"), "finished") == plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert _shown(_Tty(), Path("x"), "finished") == plain


def test_a_folder_that_the_terminal_cannot_spell_does_not_end_the_run() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal = Terminal(out, Path("läufe"), 240, CONFIG)
    terminal.show("start", 0, FACTS)
    out.seek(0)
    assert "folder    l\\xe4ufe" in out.read()


def test_long_lines_are_broken_on_a_terminal_only() -> None:
    line = "[environment] " + "name value  " * 12
    assert fitted(line, io.StringIO()) == line
    first, second, *_ = fitted(line, _Tty()).splitlines()
    assert len(first) <= 80 and second.startswith(" " * 14 + "value")
