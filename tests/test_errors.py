"""How a command line ends: one line for what a user can put right, a traceback for defects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalr.errors import exit_cleanly


def _on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")


@pytest.mark.parametrize(
    "main, reason",
    [
        (_on_the_gpu, "CUDA out of memory. Tried to allocate 20.00 MiB."),
        (lambda: torch.empty(1 << 50), "you tried to allocate"),
        (lambda: torch.empty(1 << 62, 4), "Storage size calculation overflowed"),
        (lambda: np.empty(1 << 50), "Unable to allocate 8.00 PiB"),
    ],
)
def test_a_lack_of_memory_is_one_line(
    main: object, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(main)  # type: ignore[arg-type]
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 3: out of memory (") and reason in line


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        exit_cleanly(main)  # type: ignore[arg-type]
