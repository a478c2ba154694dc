"""Sizes worked out from the configuration are those of the decoder's own tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from megalr.errors import UserError
from megalr.estimate.tensors import count, parameter_counts, plan_of, stored_tensors
from megalr.models.build import make_linear_of
from megalr.models.config import PRESETS, DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from megalr.optim.groups import parameter_groups
from megalr.tensor_parallel.mesh import Mesh
from megalr.tensor_parallel.plan import Plan
from tests.models.settings import GPT2, factorized, full_rank, low_rank, mixed, tiny
from tests.tensor_parallel.meshes import CASES
from tests.tensor_parallel.meshes import sizes as cut_sizes

METHODS: dict[str, Any] = {
    "full_rank": full_rank(),
    "low_rank": low_rank(),
    "low_rank of the MLP only": low_rank(targets=["gate", "up", "down"]),
    "sltrain": factorized("sltrain"),
    "lora": factorized("lora"),
    "cola": factorized("cola"),
    **{f"{name} of mixed ranks": mixed(factorized(name)) for name in ("sltrain", "lora")},
    "low_rank of mixed ranks": mixed(low_rank()),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "attention_bias": True},
        {"head_dim": 10, "qk_norm": "head"},
        {"head_dim": 10, "qk_norm": "full", "norm_order": "post"},
        GPT2,
    ],
)
def test_every_tensor_of_the_decoder_is_counted(name: str, changes: dict) -> None:
    sizes, method = tiny(**changes), METHODS[name]
    with torch.device("meta"):
        decoder = Decoder(sizes, make_linear_of(method, 0))
    expected = Counter(p.numel() for p in decoder.parameters())
    expected.update(b.numel() for b in decoder.buffers())
    tensors = stored_tensors(sizes, method)
    found: Counter[int] = Counter()
    for tensor in tensors:
        found[tensor.numel] += tensor.times(sizes.num_layers)
    assert found == expected
    groups = parameter_groups(decoder, decoder.factor_parameters(), 0.1)
    for group in groups:
        # Dense targets have a group of their own for some optimizers only.
        kinds = ("matrices", "targets") if group["name"] == "matrices" else (group["name"],)
        assert count(tensors, sizes.num_layers, *kinds) == sum(p.numel() for p in group["params"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"pad_multiple": 32},
        {"tie_embeddings": True, "attention_bias": True},
        {"head_dim": 10, "qk_norm": "full", "norm_order": "post"},
        GPT2,
    ],
)
def test_parameters_by_kind_are_those_of_the_decoder(name: str, changes: dict) -> None:
    sizes, method = tiny(**changes), METHODS[name]
    with torch.device("meta"):
        decoder = Decoder(sizes, make_linear_of(method, 0))
    counts = parameter_counts(sizes, method)
    assert sum(counts.values()) == parameter_count(decoder)
    trained = sum(counts.values()) - counts.get("frozen matrices", 0)
    assert trained == parameter_count(decoder, trainable_only=True)
    assert counts["embedding"] == counts.get("head", counts["embedding"]) == 101 * 48


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_rank_of_two_is_counted(name: str) -> None:
    method, layout = CASES[name]
    config = cut_sizes(name)
    sides = [_counts(config, method, Plan(Mesh(2, rank), layout)) for rank in (0, 1)]
    tensors = stored_tensors(config, method, plan_of(config, method, 2, layout))
    found: Counter[int] = Counter()
    for tensor in tensors:
        found[tensor.numel] += tensor.times(config.num_layers)
    if method.name == "sltrain":  # random positions: a rank holds half of them on average
        totals = [sum(n * times for n, times in side.items()) for side in (*sides, found)]
        assert totals[2] == pytest.approx((totals[0] + totals[1]) / 2, rel=1e-3)
    else:
        assert sides == [found, found]


def _counts(config: DecoderConfig, method: Any, plan: Plan) -> Counter[int]:
    with torch.device("meta"):
        decoder = Decoder(config, make_linear_of(method, 0), plan=plan)
    counts = Counter(p.numel() for p in decoder.parameters())
    counts.update(b.numel() for b in decoder.buffers())
    return counts


def test_plans_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor 3 does not divide model\.num_heads 32"):
        plan_of(PRESETS["llama_1b"], full_rank(), 3, "auto")
