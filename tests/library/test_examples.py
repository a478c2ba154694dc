"""The examples run as users run them, and the code of docs/library.md runs as it is printed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megalr
from tests.library.models import batch, llama, loss_of
from tests.ranks import ON_THE_CPU, free_port

ROOT = Path(__file__).parents[2]
TORCHRUN = [
    "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
    "--master-port",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["plain_loop", "trainer", pytest.param("fsdp2", marks=pytest.mark.long)]
)
def test_an_example_trains_and_restarts(name: str, tmp_path: Path) -> None:
    program = [str(ROOT / "examples" / f"{name}.py")]
    if name == "fsdp2":
        program = [*TORCHRUN, str(free_port()), *program]
    environment = {**os.environ, **ON_THE_CPU, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^update \d+: loss ([\d.]+)$", done.stdout, re.M)]
    assert len(losses) >= 3 and losses[-1] < losses[0] - 0.7
    if name == "plain_loop":
        assert re.findall(r"^update (\d+): restart$", done.stdout, re.M) == ["20", "40", "60"]
    assert list(tmp_path.iterdir()) == []


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def blocks() -> list[str]:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


class _Logits(torch.nn.Module):
    """A transformers model as a function from ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).logits


def test_the_code_of_the_page_trains_with_every_optimizer() -> None:
    names = {
        "torch": torch,
        "model": _Logits(),
        "batches": [batch(index, vocabulary=40) for index in range(2)],
        "loss_of": loss_of,
    }
    loop, callback, groups, optimizers = blocks()
    for block in (loop, callback, groups):
        exec(block, names)
    assert names["restarts"].updates == 2 and names["callback"].settings["every"] == 200
    shown = set()
    for line in filter(None, optimizers.splitlines()):
        exec(line, names)
        optimizer, model = names["optimizer"], names["model"]
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss_of(model, batch(0, vocabulary=40)).backward()
        optimizer.step()
        moved = zip(before, model.parameters(), strict=True)
        assert all(bool((p != q).any()) for p, q in moved)
        shown.add(type(optimizer).__name__)
    assert shown == set(megalr.optim.__all__)


def test_the_page_names_every_argument_of_the_layers() -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for function in (megalr.factorize_, megalr.Restarts):
        for name, parameter in inspect.signature(function).parameters.items():
            assert f"`{name}`" in text or parameter.kind != parameter.KEYWORD_ONLY, name
