"""Bytes of weights, gradients and optimizer state on the live engine are the published formulas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.engine.build import build_engine, set_learning_rate
from megalr.engine.config import resolve_deepspeed_config
from megalr.models.build import build_model, make_linear_of
from megalr.models.config import PRESETS
from megalr.models.decoder import Decoder
from tests.models.settings import factorized, full_rank, low_rank
from tests.ranks import run_distributed
from tests.training.runs import settings, zero
from tests.training.test_methods import METHODS

RANK, GALORE_RANK, DENSITY = 8, 4, 0.1
# ReLoRA stores what LoRA stores, Dion2 what Muon stores, lr_transfer what low_rank stores; engines
# with several ranks are in tests/estimate.
APART = re.compile("relora|dion2|lr_transfer|mixed_ranks")
MEASURED = ["full_rank", "low_rank", *(name for name in METHODS if not APART.match(name))]


def _state_of_target(name: str, m: int, n: int) -> int:
    """Elements of optimizer state of one m x n target matrix, scalars left out."""
    s, l, r, g = min(m, n), max(m, n), RANK, GALORE_RANK  # noqa: E741
    factors = 2 * (m + n) * r
    return {
        "full_rank": 2 * m * n,
        "low_rank": factors,
        "lora": factors,
        "cola": factors,
        "dlr": factors,
        "dlr_cola": factors,
        "loro": factors,
        "sltrain": factors + 2 * int(DENSITY * m * n),
        "galore": s * g + 2 * l * g,
        "fira": s * g + 2 * l * g,
        "golore": s * g + 2 * l * g,
        "apollo": 2 * l * g,
        "apollo_mini": 2 * l,
        "spam": 2 * m * n,
        "stable_spam": 2 * m * n,
        "muon": m * n,
        "normuon": m * n + m,
        "scale": 0,
        "spectron": factors // 2 + 2 * r,
    }[name]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors with at least one dimension inside nested states."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _measure(values: dict[str, Any], stage: int) -> dict[str, int]:
    """Counts on this rank after one update, and what does not depend on the method."""
    import torch.distributed as dist

    config = RunConfig.model_validate(values)
    decoder = build_model(config, torch.device("cpu"))
    sizes = decoder.config
    ds_config = resolve_deepspeed_config(config, zero(stage), "test", dist.get_world_size())
    engine = build_engine(config, ds_config, decoder)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    wrapper = engine.optimizer
    masters = [p for group in wrapper.optimizer.param_groups for p in group["params"]]
    ids = torch.arange(48).reshape(2, 24)
    for _ in range(engine.gradient_accumulation_steps()):
        set_learning_rate(engine, 0.01)
        engine.backward(engine(ids, ids.roll(-1, 1), scale=0.01).clone(), scale_wrt_gas=False)
        engine.step()
    state = list(_tensors(dict(engine.basic_optimizer.state)))
    counts = {
        "state": sum(t.numel() for t in state),
        "state_bytes": sum(t.numel() * t.element_size() for t in state),
        "masters": sum(p.numel() for p in masters),
        "groups": len(masters),
        "trained": trained,
        "hidden": sizes.hidden_size,
    }
    engine.destroy()
    return counts


def _targets(h: int, kv: int, mlp: int) -> list[tuple[int, int]]:
    return [(h, h), (kv, h), (kv, h), (h, h), (mlp, h), (mlp, h), (h, mlp)]


@pytest.mark.parametrize("world_size, stage", [(1, 1), (3, 2)])
@pytest.mark.parametrize("name", MEASURED)
def test_state_and_masters_are_the_formulas_divided_over_ranks(
    name: str, world_size: int, stage: int, tmp_path: Path
) -> None:
    sections = {
        "full_rank": {"method": {"name": "full_rank"}},
        "low_rank": {},
        "spam": {**METHODS["spam"], "method": {"name": "full_rank"}},
        "stable_spam": {**METHODS["stable_spam"], "method": {"name": "full_rank"}},
        **{
            name: {**METHODS[name], "method": {"name": "full_rank"}}
            for name in ("muon", "dion2", "normuon", "scale")
        },
    }.get(name) or METHODS.get(name, {})
    values = settings(tmp_path, tmp_path, **sections, model={"pad_multiple": 1})
    ranks = run_distributed(_measure, world_size, values, stage)

    h, kv, mlp, vocab, layers = 48, 24, 83, 120, 2
    others = 2 * vocab * h + (2 * layers + 1) * h  # embedding, head, norms: Adam's two moments
    expected = 2 * others if name != "scale" else vocab * h + 2 * (2 * layers + 1) * h
    expected += layers * sum(_state_of_target(name, m, n) for m, n in _targets(h, kv, mlp))
    if (
        name == "stable_spam"
    ):  # three scalars a tensor (7 targets a layer, 2 + 5 others) on each rank
        expected += 3 * (7 * layers + 2 + 2 * layers + 1) * world_size
    total = sum(rank["state"] for rank in ranks)
    # ZeRO pads every group's flat storage to a multiple of 2 elements a rank; Adam's moments of
    # that padding are stored too.
    spare = sum(rank["masters"] for rank in ranks) - ranks[0]["trained"]
    assert 0 <= spare < 2 * world_size * ranks[0]["groups"]
    assert 0 <= total - expected <= 2 * spare
    assert sum(rank["state_bytes"] for rank in ranks) == 4 * total
    # Each rank holds its share of the masters; states of whole matrices lie on their owners.
    assert max(rank["masters"] for rank in ranks) == min(rank["masters"] for rank in ranks)
    if name in ("full_rank", "low_rank", "sltrain", "lora", "cola"):
        assert max(rank["state"] for rank in ranks) == min(rank["state"] for rank in ranks)


PARAMETERS = {  # millions, counted by hand; the reference's SLTrain keeps its positions in int64
    "llama_60m": (58.07, 42.77, 43.53, 128),
    "llama_350m": (367.97, 185.22, 194.29, 256),
}
GIGABYTES = {  # bf16 weights and AdamW states
    "llama_60m": (0.348, 0.257, 0.267, 0.307),
    "llama_350m": (2.208, 1.111, 1.238, 1.716),
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_published_model_sizes(preset: str) -> None:
    *millions, rank = PARAMETERS[preset]
    sparse = factorized("sltrain", rank)
    sparse.density = 0.03
    methods = [full_rank(), low_rank(rank), sparse, factorized("lora", rank)]
    bytes_of = []
    for method in methods:
        with torch.device("meta"):
            decoder = Decoder(replace(PRESETS[preset], pad_multiple=1), make_linear_of(method, 0))
        stored = sum(p.numel() for p in decoder.parameters())
        trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
        positions = sum(b.numel() for b in decoder.buffers())
        bytes_of.append((2 * stored + 4 * trained + 8 * positions) / 1e9)
        if method.name != "lora":
            assert stored / 1e6 == pytest.approx(millions[len(bytes_of) - 1], abs=0.006)
    assert bytes_of == pytest.approx(GIGABYTES[preset], abs=0.0015)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("first", [True, False])
def test_a_workspace_holds_the_free_segment_that_it_was_put_into(first: bool) -> None:
    """Why build_engine gives back what is free before the first product."""
    free = 2**29

    def product() -> None:
        x = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
        torch.nn.functional.linear(x, x)
        torch.cuda.synchronize()

    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    if first:
        product()
        torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.empty(free, device="cuda", dtype=torch.uint8)
    product()
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_reserved() - before >= free) == (not first)
