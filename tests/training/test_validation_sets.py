"""Several validation sets: each is evaluated as it would be alone, and the first one counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_distributed
from tests.synthetic import write_dataset
from tests.training.runs import events, run, settings, zero

KEYS = ("update", "loss", "perplexity", "perplexity_published", "tokens")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("other") / "data", documents=90, seed=5)


def numbers(found: list[dict[str, Any]]) -> list[list[Any]]:
    return [[event[key] for key in KEYS] for event in found]


def test_each_set_gets_the_numbers_of_a_run_that_has_it_alone(
    data: Path, other: Path, tmp_path: Path
) -> None:
    values = {}
    for name, validation in (
        ("both", {"own": [str(data)], "other": [str(other)]}),
        ("own", [str(data)]),
        ("other", [str(other)]),
    ):
        values[name] = settings(tmp_path / name, data, checkpoint={"every": 5, "keep_best": 1})
        values[name]["data"]["validation"] = validation
        run_distributed(run, 2, values[name], zero(1))
    first, further = events(tmp_path / "both", "eval"), events(tmp_path / "both", "eval_further")
    assert [event["validation"] for event in (*first, *further)] == ["own"] * 2 + ["other"] * 2
    assert numbers(first) == numbers(events(tmp_path / "own", "eval"))
    assert numbers(further) == numbers(events(tmp_path / "other", "eval"))
    assert "validation" not in events(tmp_path / "own", "eval")[0]
    assert not events(tmp_path / "own", "eval_further")
    # The checkpoint remembers the loss of the first set, by which the best ones are chosen.
    for name in ("both", "own"):
        manifest = tmp_path / name / "checkpoints" / "update_10" / "manifest.json"
        saved = json.loads(manifest.read_text(encoding="utf-8"))
        assert saved["validation_loss"] == first[-1]["loss"], name
