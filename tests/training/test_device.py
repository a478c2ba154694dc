"""What is known of the device and of compilation."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.training import device as hardware
from megalr.training.device import CompileClock


def _torch_seconds(clock: CompileClock) -> float:
    seconds = clock.metrics()["compile_seconds"]
    assert seconds is not None
    return seconds


def test_compilation_is_timed() -> None:
    clock = CompileClock()
    before = _torch_seconds(clock)
    torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(torch.ones(3))
    after = _torch_seconds(clock)
    assert after > before
    torch.ones(3).sin()
    assert _torch_seconds(clock) == after


def test_compilation_of_our_kernels_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Triton: ours count, torch.compile's do not, other listeners go on."""
    heard: list[Any] = []
    compilation = SimpleNamespace(listener=lambda **facts: heard.append(facts["src"]))
    triton = SimpleNamespace(knobs=SimpleNamespace(compilation=compilation))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(hardware, "HAS_TRITON", True)
    clock = CompileClock()
    for module, microseconds in (("megalr.kernels.x", 2e6), ("torch._inductor", 5e6)):
        source = SimpleNamespace(fn=SimpleNamespace(__module__=module))
        compilation.listener(src=source, times=SimpleNamespace(total=microseconds), cache_hit=False)
    assert clock.metrics()["kernel_seconds"] == 2.0 and len(heard) == 2
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())  # before 3.4
    assert CompileClock().metrics()["kernel_seconds"] is None
