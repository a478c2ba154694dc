"""What DeepSpeed does around checkpoints (docs/dev/deepspeed-notes.md); fails when that changes."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, message_of, train


def _facts(folder: str) -> dict[str, Any]:
    import torch.distributed as dist
    from deepspeed.runtime.model_checkpointing.utils import create_universal_parallel_info
    from deepspeed.utils import groups

    found: dict[str, Any] = {}
    with engine_of("fp32 stage 1") as engine:
        train(engine, 0)
        # The decoupled writer sends this dictionary to its process.
        found["decoupled"] = message_of(ForkingPickler.dumps, engine.optimizer.state_dict())
        found["environment"] = message_of(create_universal_parallel_info, groups, False)
        base = engine.basic_optimizer
        engine.save_checkpoint(folder, tag="t", save_latest=False)
        base.param_groups[0]["betas"] = (0.5, 0.5)
        engine.load_checkpoint(folder, tag="t")
        found["betas"] = base.param_groups[0]["betas"]
        padded = [g.numel() for g in engine.optimizer.single_partition_of_fp32_groups]
        saved = engine.optimizer.state_dict()["single_partition_of_fp32_groups"]
        found["padding"] = dist.get_rank(), padded, [group.numel() for group in saved]
    return found


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_facts, 3, str(tmp_path_factory.mktemp("facts")))


def test_the_decoupled_writer_cannot_take_the_state_of_zero(facts: list[dict[str, Any]]) -> None:
    assert "refusing to serialize non-leaf tensor" in facts[0]["decoupled"]


def test_the_writers_need_variables_that_only_deepspeeds_launcher_sets(
    facts: list[dict[str, Any]],
) -> None:
    assert "CROSS_SIZE" in facts[0]["environment"]


def test_loading_brings_back_the_options_that_were_saved(facts: list[dict[str, Any]]) -> None:
    assert tuple(facts[0]["betas"]) == (0.9, 0.99)


def test_saved_masters_have_no_padding_at_the_end(facts: list[dict[str, Any]]) -> None:
    _, held, saved = facts[2]["padding"]  # the last rank has the padding
    assert any(s < h for s, h in zip(saved, held, strict=True))
    assert facts[0]["padding"][1] == facts[0]["padding"][2]


def test_the_converter_insists_on_an_entry_that_the_user_must_write(tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    class Without:
        def get_checkpoint_info(self, _: str) -> None:
            return None

    assert "universal_checkpoint_info" in message_of(
        ds_to_universal._check_for_required_state, Without()
    )
