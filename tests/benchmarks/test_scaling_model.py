"""The scaling model: its fit, its agreement with records, its choices, its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.estimate.steps import Gpu, predict

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Any:
    """benchmarks/scaling_model.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import scaling_model

        yield scaling_model


def _single(model: ModuleType) -> list[Any]:
    return [run for run in model.recorded() if run.job.gpus == 1]


def test_the_fit_finds_the_gpu_that_made_the_times(model: ModuleType) -> None:
    gpu = Gpu(5e14, 3e12, 2e-3)
    made = [replace(r, seconds=predict(r.job, gpu, model.H200).total) for r in _single(model)]
    found = model.fit(made)
    assert (found.flops, found.bandwidth) == pytest.approx((gpu.flops, gpu.bandwidth))
    assert found.overhead == pytest.approx(gpu.overhead)


def test_every_recorded_run_is_predicted_within_fifteen_percent(model: ModuleType) -> None:
    runs = model.recorded()
    assert len(runs) >= 7
    gpu = model.fit(_single(model))
    for run in runs:
        assert predict(run.job, gpu, model.H200).total == pytest.approx(run.seconds, rel=0.15), run


def test_the_links_give_the_measured_all_reduces(model: ModuleType) -> None:
    from megalr.estimate.cluster import Members, all_reduce

    for size, seconds in model.ALL_REDUCES:
        assert all_reduce(size, Members(4, 1), model.H200) == pytest.approx(seconds, rel=0.05)


def test_choices_fit_the_memory_and_keep_the_batch(model: ModuleType) -> None:
    gpu = model.fit(_single(model))
    roomy = model.choose("llama_7b", "full_rank", 16, gpu, model.H200)
    tight = model.choose(
        "llama_7b", "full_rank", 16, gpu, replace(model.H200, memory=0.6 * roomy.memory)
    )
    for choice in (roomy, tight):
        job = choice.job
        assert job.gpus == 16 and job.tokens == 2048 * 2048
    assert tight.memory <= 0.6 * roomy.memory
    assert tight.time.total >= roomy.time.total
    with pytest.raises(UserError, match="does not fit 16 GPUs of 1 GiB"):
        model.choose("llama_7b", "full_rank", 16, gpu, replace(model.H200, memory=2**30))


def test_the_page_keeps_what_stands_around_the_tables(model: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text("before\n<!-- predictions: begin -->\nold\n<!-- predictions: end -->\nafter\n")
    choice = model.choose("llama_1b", "low_rank", 8, model.fit(_single(model)), model.H200)
    model.write_between(page, model.tables([choice]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 8 | 1 |" in text
    with pytest.raises(UserError, match="nothing was written"):
        model.write_between(tmp_path / "other.md", "text")
