"""The scaling model: its fit, its agreement with records, its choices, its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scaling.choices import choose
from scaling.points import ALL_REDUCES, fit, recorded
from scaling.report import tables, write_between

from megalr.errors import UserError
from megalr.estimate.cluster import H200, Members, all_reduce_seconds
from megalr.estimate.update_time import Gpu, predict


def _single() -> list[Any]:
    return [run for run in recorded() if run.job.gpus == 1]


def test_the_fit_finds_the_gpu_that_made_the_times() -> None:
    gpu = Gpu(5e14, 3e12, 2e-3)
    made = [replace(r, seconds=predict(r.job, gpu, H200).total) for r in _single()]
    found = fit(made)
    assert (found.flops, found.bandwidth) == pytest.approx((gpu.flops, gpu.bandwidth))
    assert found.overhead == pytest.approx(gpu.overhead)


def test_every_recorded_run_is_predicted_within_fifteen_percent() -> None:
    runs = recorded()
    assert len(runs) >= 7
    gpu = fit(_single())
    for run in runs:
        assert predict(run.job, gpu, H200).total == pytest.approx(run.seconds, rel=0.15), run


def test_a_recorded_row_becomes_its_job(tmp_path: Path) -> None:
    method = {"name": "low_rank", "rank": 1024, "alpha": 32.0}
    row = {"case": "a", "preset": "llama_7b", "method": method, "precision": "bf16", "stage": 1}
    row |= {"micro_batch": 16, "gpus": 4, "tensor": 2, "layout": "bottleneck", "accumulation": 3}
    row |= {"train": {"activation_checkpointing": "full"}, "tokens_per_second": 1000}
    others: list[dict[str, Any]] = [
        {"precision": "paper_bf16"},
        {"train": {"activation_checkpointing": "mlp"}},
        {"train": {"compile": False}},
        {"restarts": {"every": 8}},
        {"zero": {"overlap_comm": True}},
        {"optimizer": {"name": "muon"}},
    ]
    rows = [row, *({**row, **other} for other in others)]
    (tmp_path / "throughput_4gpu.json").write_text(json.dumps(rows))
    (run,) = recorded(tmp_path)
    job = run.job
    assert (job.plan.mesh.tensor_size, job.plan.layout, job.data_size) == (2, "bottleneck", 2)
    assert (job.micro_batch, job.accumulation, job.recompute) == (16, 3, "full")
    assert run.seconds == pytest.approx(16 * 256 * 3 * 2 / 1000)


def test_the_links_give_the_measured_all_reduces() -> None:
    for size, seconds in ALL_REDUCES:
        assert all_reduce_seconds(size, Members(4, 1), H200) == pytest.approx(seconds, rel=0.05)


def test_choices_fit_the_memory_and_keep_the_batch() -> None:
    gpu = fit(_single())
    roomy = choose("llama_7b", "full_rank", 16, gpu, H200)
    tight = choose("llama_7b", "full_rank", 16, gpu, replace(H200, memory=0.6 * roomy.memory))
    for choice in (roomy, tight):
        job = choice.job
        assert job.gpus == 16 and job.tokens == 2048 * 2048
    assert tight.memory <= 0.6 * roomy.memory
    assert tight.time.total >= roomy.time.total
    with pytest.raises(UserError, match="does not fit 16 GPUs of 1 GiB"):
        choose("llama_7b", "full_rank", 16, gpu, replace(H200, memory=2**30))


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text("before\n<!-- predictions: begin -->\nold\n<!-- predictions: end -->\nafter\n")
    choice = choose("llama_1b", "low_rank", 8, fit(_single()), H200)
    write_between(page, tables([choice]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 8 | 1 |" in text
    with pytest.raises(UserError, match="nothing was written"):
        write_between(tmp_path / "other.md", "text")
