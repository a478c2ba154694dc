"""The benchmark of long attention keeps every length as it is measured, and goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attention_lengths
import pytest
import torch

HEADS = (2, 2, 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is measured: (batch, length), or the heads for errors. "stop" in it stops the call."""
    found: list[Any] = []

    def measure(B: int, S: int, heads: tuple[int, int, int]) -> dict[str, Any]:
        if "stop" in found:
            raise KeyboardInterrupt
        found.append((B, S))
        fastest = None if S == 32 and found.count((B, S)) == 1 else "torch"
        backends = {"torch": {"failed": "out of memory"}} if fastest is None else {}
        return {
            "B": B, "S": S, "torch_takes": "FLASH", "fastest": fastest,
            "backends": backends,
        }  # fmt: skip

    def errors(heads: tuple[int, int, int], device: str) -> dict[str, Any]:
        found.append(heads)
        return {"torch": {"o": 1e-3}}

    shapes = {"small": (HEADS, (16, 32)), "other": ((4, 4, 8), (16,))}
    monkeypatch.setattr(attention_lengths, "measure", measure)
    monkeypatch.setattr(attention_lengths, "errors", errors)
    monkeypatch.setattr(attention_lengths, "SHAPES", shapes)
    monkeypatch.setattr(attention_lengths, "TOKENS", 64)
    monkeypatch.setattr(attention_lengths, "cuda_device", lambda: "a device")
    for name in ("Stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return found


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, Any]:
    """The file after a call."""
    monkeypatch.setattr("sys.argv", ["attention_lengths.py", "--output", str(folder), *options])
    attention_lengths.main()
    return json.loads((folder / "attention_lengths.json").read_text())


def test_what_a_file_holds_is_not_measured_again(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = call(monkeypatch, tmp_path, "--shapes", "small", "--lengths", "16")
    assert measured == [HEADS, (4, 16)]
    two = call(monkeypatch, tmp_path)
    assert measured[2:] == [(2, 32), (4, 4, 8), (4, 16)]
    assert two["shapes"]["small"]["rows"][0] == one["shapes"]["small"]["rows"][0]
    assert len(two["earlier"]) == 1
    three = call(monkeypatch, tmp_path)  # at 32 no backend had a result
    assert measured[5:] == [(2, 32)]
    assert [row["fastest"] for row in three["shapes"]["small"]["rows"]] == ["torch", "torch"]
    four = call(monkeypatch, tmp_path)
    assert len(measured) == 6 and four["shapes"] == three["shapes"]
    call(monkeypatch, tmp_path, "--again")
    assert measured[6:] == [HEADS, (4, 16), (2, 32), (4, 4, 8), (4, 16)]


def test_a_call_that_is_stopped_leaves_the_lengths_before(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row_of = attention_lengths.row_of

    def stop(name: str, found: dict[str, Any]) -> str:
        if found["S"] == 16:
            measured.append("stop")  # the next one is interrupted
        return row_of(name, found)

    monkeypatch.setattr(attention_lengths, "row_of", stop)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, tmp_path)
    kept = json.loads((tmp_path / "attention_lengths.json").read_text())["shapes"]
    assert list(kept) == ["small"] and [row["S"] for row in kept["small"]["rows"]] == [16]
