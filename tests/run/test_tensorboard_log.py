"""Curves and texts as TensorBoard reads them back."""

from __future__ import annotations

from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalr.run.metrics_writer import MetricsWriter
from tests.ranks import run_distributed
from tests.run.test_terminal import CONFIG, EVENTS, FACTS
from tests.training.runs import run, settings, zero

STEP = {"loss": 4.0, "learning_rate": 0.1, "tokens": 960, "mfu": "n/a", "eta_seconds": 1.0}


def _read(folder: Path, name: str) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard" / name)).Reload()


def _points(folder: Path, name: str, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _read(folder, name).Scalars(tag)]


def test_a_run_writes_training_and_validation_of_one_tag_loss_first(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data, log={"tensorboard": True, "every": 2})
    values["data"]["validation"] = {"one": str(data), "two": str(data)}
    values["restarts"] = {"every": 4}
    run_distributed(run, 1, values, zero(1))
    runs = sorted(path.name for path in (folder / "tensorboard").iterdir())
    assert runs == ["train", "validation", "validation_two"]
    train = _read(folder, "train")
    tags = sorted(train.Tags()["scalars"])
    assert tags[:2] == ["loss", "lr"]
    assert [event.step for event in train.Scalars("loss")] == [2, 4, 6, 8, 10]
    assert [step for step, _ in _points(folder, "validation", "loss")] == [5, 10]
    (text,) = train.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    written = yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```"))
    assert written == yaml.safe_load((folder / "config.yaml").read_text())
    (facts,) = train.Tensors("facts/text_summary")
    assert "| parameters | " in facts.tensor_proto.string_val[0].decode()


def test_steps_that_a_resume_or_a_rollback_went_back_over_are_purged(tmp_path: Path) -> None:
    def start() -> MetricsWriter:
        return MetricsWriter(tmp_path, True, 100, True, None, CONFIG)

    with start() as writer:
        writer.write("start", 0, **FACTS)
        for update in (10, 20, 30):
            writer.write("step", update, **STEP)
            writer.write("eval", update, **EVENTS["eval"])
        writer.write("rollback", 30, **EVENTS["rollback"] | {"to_update": 10})
        writer.write("step", 20, **STEP | {"loss": 3.0})
    assert _points(tmp_path, "train", "loss") == [(10, 4.0), (20, 3.0)]
    assert [step for step, _ in _points(tmp_path, "validation", "perplexity")] == [10]
    with start() as writer:
        writer.write("start", 10, **FACTS)
        writer.write("step", 20, **STEP | {"loss": 2.0})
    assert _points(tmp_path, "train", "loss") == [(10, 4.0), (20, 2.0)]
    assert _read(tmp_path, "train").Tags()["scalars"] == ["loss", "lr"]


def test_what_does_not_change_is_not_plotted(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, True, 100, True, None, CONFIG) as writer:
        writer.write("start", 0, **FACTS)
        writer.write("restart", 10, **EVENTS["restart"])
    tags = _read(tmp_path, "train").Tags()["scalars"]
    assert tags == ["restart/refactorize_seconds", "restart/dead_directions"]
