"""The page on several budgets: its commands run with a tiny model and a fiftieth of the updates."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.site.test_tutorials import blocks
from tests.synthetic import VOCAB_SIZE, write_dataset
from tests.training.runs import events
from tests.warm import ROOT, start_ranks

PEAK = 4e-3
SMALLER = [
    *("model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2"),
    *(f"model.vocab_size={VOCAB_SIZE}", "method.rank=4", "data.sequence_length=24"),
    *("evaluation.every=0", "evaluation.tokens=200", "log.every=1", "log.tensorboard=false"),
]


def _fiftieth(word: str) -> str:
    """``train.updates=400`` with 8, ``run.fork_from=runs/stable@200`` with 4."""
    found = re.fullmatch(r"(.*(?:updates|every)=|.*@)(\d+)", word)
    if found is None:
        return word
    number, rest = divmod(int(found[2]), 50)
    assert rest == 0, word
    return f"{found[1]}{number}"


@pytest.mark.long
def test_the_branches_of_the_page_decay_from_the_stable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "first")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    text = "".join(block for _, block in blocks("budgets.md")).replace("\\\n", " ")
    trained = 0
    for line in text.splitlines():
        program, command, *words = shlex.split(line)
        assert program == "megalr"
        if command != "train":
            continue
        trained += 1
        words = [_fiftieth(word) for word in words]
        more = SMALLER if "recipes/quickstart.yaml" in words else []
        job = start_ranks(tmp_path / f"job-{trained}", [*words, *more], 1)
        assert job.wait() == [0], job.output()
    assert trained == 4
    rates = {
        name: {e["update"]: e["learning_rate"] for e in events(Path("runs") / name, "step")}
        for name in ("stable", "short", "long")
    }
    assert rates["stable"] == pytest.approx({1: 0.0} | dict.fromkeys(range(2, 17), PEAK))
    assert rates["short"] == pytest.approx({5: PEAK})
    assert rates["long"] == pytest.approx({9: PEAK, 10: PEAK * (0.1 + 0.9 * (1 - 0.5**0.5))})
    for name, update in (("short", 4), ("long", 8)):
        (forked,) = events(Path("runs") / name, "fork")
        assert forked["source_update"] == forked["update"] == update
        assert forked["path"] == f"runs/stable/checkpoints/update_{update}"
