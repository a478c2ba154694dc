"""Models that cannot be sharded are rejected in one line that says what would work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.models.build import make_plan
from megalr.models.config import DecoderConfig, decoder_config
from megalr.tensor_parallel.mesh import Mesh, check_tensor_size
from tests.models.settings import factorized, full_rank, low_rank, tiny
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import run, settings, zero


def _plan(config: DecoderConfig, method: SimpleNamespace, size: int, layout: str) -> str:
    return make_plan(config, method, Mesh(tensor_size=size), layout).layout


@pytest.mark.parametrize(
    ("config", "method", "size", "layout", "words"),
    [
        (tiny(), low_rank(), 4, "auto", "4 does not divide model.num_heads 6: use one of 1, 2"),
        (
            decoder_config("llama_60m", {"num_kv_heads": 2}),
            low_rank(),
            4,
            "auto",
            "4 does not divide model.num_kv_heads 2: use one of 1, 2",
        ),
        (
            decoder_config("llama_1b", {"pad_multiple": 1}),
            low_rank(),
            2,
            "auto",
            "2 does not divide the padded MLP width 5461 (set by model.pad_multiple 1)",
        ),
        (tiny(), full_rank(), 2, "bottleneck", "(low_rank and cola), not full_rank: use"),
        (tiny(), factorized("sltrain"), 2, "bottleneck", "not sltrain"),
        (tiny(), low_rank(targets=["q", "k", "v", "o"]), 2, "bottleneck", "lacks down, gate, up"),
        (tiny(norm="layernorm"), low_rank(), 2, "bottleneck", "needs RMSNorm and rotary positions"),
    ],
)
def test_plans_that_do_not_fit(
    config: DecoderConfig, method: SimpleNamespace, size: int, layout: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        _plan(config, method, size, layout)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_auto_takes_the_layout_that_the_model_has() -> None:
    config = decoder_config("llama_60m", {})
    wide = replace(config, hidden_size=2048, num_heads=32, num_kv_heads=None)
    for size in (2, 4):
        assert _plan(config, low_rank(), size, "auto") == "column_row"
        assert _plan(wide, low_rank(), size, "auto") == "bottleneck"
        assert _plan(wide, full_rank(), size, "auto") == "column_row"
    assert _plan(wide, low_rank(), 1, "auto") == "column_row"  # nothing is sharded
    assert _plan(config, low_rank(), 2, "bottleneck") == "bottleneck"


@pytest.mark.parametrize(("tensor", "world"), [(4, 2), (4, 6), (3, 8)])
def test_ranks_that_do_not_make_a_grid(tensor: int, world: int) -> None:
    with pytest.raises(UserError) as caught:
        check_tensor_size(tensor, world)
    fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
    assert str(caught.value).startswith(
        f"parallel.tensor {tensor} does not divide the {world} ranks of this start: use one of "
        f"{fitting}"
    )


@pytest.mark.parametrize(
    ("stage", "sections", "words"),
    [
        (3, {}, "parallel.tensor 2 with ZeRO stage 3"),
        (1, {"parallel": {"tensor": 4}}, "does not divide the 2 ranks"),
        (1, {"method": {"name": "galore", "rank": 8}}, "looks at whole tensors"),
    ],
)
def test_runs_that_cannot_work_stop_before_they_start(
    stage: int, sections: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    values = settings(
        tmp_path / "run", data, model={"num_kv_heads": 4}, **{"parallel": {"tensor": 2}, **sections}
    )
    with pytest.raises(RankFailed, match=words):
        run_distributed(run, 2, values, zero(stage))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
