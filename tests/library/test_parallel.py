"""Optimizers and restarts under DDP and FSDP2 on several ranks against one process."""

from __future__ import annotations

import pytest

from tests.library import parallel
from tests.ranks import run_distributed

EXACT = 1e-12
"""float64: sums over ranks in another order; measured 4e-15 at most."""


def _check(results: list[dict[str, float]]) -> None:
    for result in results:
        far = {kind: x for kind, x in result.items() if not x <= EXACT}
        assert not far


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_fsdp2_reaches_the_weights_of_one_process(world: int) -> None:
    _check(run_distributed(parallel.distances, world, "fsdp2", list(parallel.OPTIMIZERS)))


def test_ddp_reaches_the_weights_of_one_process() -> None:
    _check(run_distributed(parallel.distances, 2, "ddp", list(parallel.OPTIMIZERS)))


@pytest.mark.parametrize("mode", ["fsdp2", "ddp"])
def test_sparse_parts_are_trained_alike(mode: str) -> None:
    _check(run_distributed(parallel.distances, 2, mode, ["adamw", "stable_spam"], 0.2))


def test_copies_of_a_sharded_model_stay_equal() -> None:
    kinds = ["adamw", "adamw, transport", "galore"]
    _check(run_distributed(parallel.distances, 2, "hybrid", kinds))


@pytest.mark.long
def test_runs_under_fsdp2_resume_bit_for_bit_from_the_files_of_each_rank() -> None:
    for result in run_distributed(parallel.resumed, 2, list(parallel.OPTIMIZERS)):
        assert all(result.values()), result


def test_whole_matrices_are_shared_out_over_the_ranks() -> None:
    assert run_distributed(parallel.busy_ranks, 2, "galore") == [4, 4]


@pytest.mark.long
def test_elementwise_states_are_saved_together_and_loaded_on_another_number_of_ranks(
    tmp_path,
) -> None:
    """torch.distributed.checkpoint writes one folder; two ranks save, three load."""
    kinds = ["adamw", "spam", "stable_spam", "scale"]
    for kind in kinds:
        run_distributed(parallel.save_together, 2, kind, str(tmp_path / kind))
    for result in run_distributed(parallel.continue_from, 3, kinds, str(tmp_path)):
        assert max(result.values()) <= EXACT, result


def test_states_of_whole_matrices_are_refused_by_other_ranks() -> None:
    messages = run_distributed(parallel.load_of_rank_0, 2, "galore")
    assert messages[0] is None
    assert messages[1].startswith("states of rank 0 of 2 cannot be loaded on rank 1 of 2: ")


def test_other_placements_than_rows_are_refused() -> None:
    for messages in run_distributed(parallel.refusals, 2):
        for message, part in zip(messages, parallel.REFUSED, strict=True):
            assert part in message and "\n" not in message
