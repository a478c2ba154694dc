"""What is known of the device and of compilation."""

from __future__ import annotations

import torch

from megalr.training.hardware import compile_seconds


def test_compilation_is_timed() -> None:
    before = compile_seconds()
    torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(torch.ones(3))
    after = compile_seconds()
    assert after > before
    torch.ones(3).sin()
    assert compile_seconds() == after
