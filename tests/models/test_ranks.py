"""``method.ranks``: which entry a matrix follows, what is refused, what is counted."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn
from torch._dynamo.utils import counters

from megalr.config.loading import dump_config, load_run_config
from megalr.config.resuming import check_allowed, differences_that_forbid_resume
from megalr.config.schema import RunConfig
from megalr.engine.build import check_run, compile_blocks
from megalr.errors import UserError
from megalr.models.build import build_decoder, describe_parameters
from megalr.models.flops import flops_per_token, parameter_count
from megalr.models.ranks import matrix_names, rank_of
from tests.models.settings import ALL_TARGETS, factorized, low_rank, tiny

RANKS = {"layers.0.*": 12, "q": 4, "*.mlp.*": 5, "layers.1.mlp.down": 6, "attention.o": 7}
EXPECTED = {
    **{f"layers.{n}.attention.q": 4 for n in (0, 1)},
    **{f"layers.{n}.attention.o": 7 for n in (0, 1)},
    **{f"layers.{n}.mlp.{name}": 5 for n in (0, 1) for name in ("gate", "up", "down")},
    **{f"layers.0.attention.{name}": 12 for name in "kv"},
    **{f"layers.1.attention.{name}": 8 for name in "kv"},
    "layers.1.mlp.down": 6,
}


def _config(**method: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "llama_9m"},
            "optimizer": {"lr": 1e-3},
            "data": {"train": "unused", "sequence_length": 64},
            "train": {"updates": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "method": {"name": "low_rank", "rank": 16, **method},
        }
    )


def test_the_last_entry_that_names_a_matrix_counts() -> None:
    method, sizes = low_rank(ranks=RANKS), tiny()
    names = [name for n in (0, 1) for group in matrix_names(sizes, n).values() for name in group]
    assert {name: rank_of(method, name) for name in names} == EXPECTED
    decoder = build_decoder(sizes, method, seed=0)
    assert {pair.name: pair.rank for pair in decoder.factor_pairs()} == EXPECTED
    assert [pair.scale * pair.rank for pair in decoder.factor_pairs()] == pytest.approx([16.0] * 14)
    shapes = {"k": (16, 48), "v": (16, 48), "gate": (83, 48), "up": (83, 48), "down": (48, 83)}
    weights = sum(
        rank * sum(shapes.get(name.rsplit(".", 1)[1], (48, 48))) for name, rank in EXPECTED.items()
    )
    assert parameter_count(decoder) == weights + (2 * 101 + 5) * 48
    attention = 2 * 4 * 48 * 33 / 2
    assert flops_per_token(decoder, 32) == 3 * (2 * (weights + 101 * 48) + attention)


def test_other_ranks_draw_the_same_as_a_model_of_that_rank() -> None:
    part = build_decoder(tiny(), low_rank(ranks={"q": 4, "layers.1.*": 4}), seed=5)
    whole = build_decoder(tiny(), low_rank(rank=4, alpha=16.0), seed=5)
    other = build_decoder(tiny(), low_rank(), seed=5)
    for pair in part.factor_pairs():
        same = whole if pair.rank == 4 else other
        (wanted,) = [p for p in same.factor_pairs() if p.name == pair.name]
        for ours, theirs in (
            (pair.a[slice(*pair.a_rows)], wanted.a[slice(*wanted.a_rows)]),
            (pair.b[slice(*pair.b_rows)], wanted.b[slice(*wanted.b_rows)]),
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "ranks, targets, message",
    [
        (
            {"q_proj": 4},
            ALL_TARGETS,
            r"method.ranks 'q_proj' names no factorized matrix: there are",
        ),
        (
            {"down": 4},
            ["q", "k", "v"],
            r"'down' names no factorized matrix: .*attention.v in layers",
        ),
        ({"layers.2.*": 4}, ALL_TARGETS, r"'layers.2.\*' names no .* in layers 0 to 1"),
        (
            {"layers.1.*": 17},
            ALL_TARGETS,
            r"method.ranks 'layers.1.\*' = 17 is larger than 16, .* layers.1.attention.k: choose",
        ),
        ({"": 4}, ALL_TARGETS, "method.ranks '' names no factorized matrix"),
    ],
)
def test_entries_that_fit_nothing_are_refused(
    ranks: dict[str, int], targets: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_decoder(tiny(), low_rank(ranks=ranks, targets=targets), seed=0)
    assert "\n" not in str(caught.value)


def test_spectron_wants_one_scale_for_all_matrices() -> None:
    values = _config().model_dump(mode="json")
    values["optimizer"] = {"name": "spectron", "lr": 0.01}
    values["method"] |= {"alpha": 16.0, "init": "orthogonal"}
    RunConfig.model_validate(values)
    values["method"]["ranks"] = {"q": 8}
    with pytest.raises(ValueError, match=r"method\.ranks: spectron bounds .*: use one rank"):
        RunConfig.model_validate(values)


def test_recomputation_that_keeps_q_k_v_needs_equal_ranks() -> None:
    with pytest.raises(UserError, match=r"ranks of layers.0.attention.q, .* differ: use none"):
        build_decoder(tiny(), low_rank(ranks={"q": 4}), seed=0, recompute="mlp")
    build_decoder(tiny(), low_rank(ranks={"gate": 4}, rank=8), seed=0, recompute="bottleneck")
    build_decoder(tiny(), factorized("cola"), seed=0, recompute="mlp")


def test_a_configuration_holds_its_ranks_in_order() -> None:
    config = _config(ranks={"layers.0.*": 24, "down": 8})
    text = dump_config(config)
    assert "  ranks:\n    layers.0.*: 24\n    down: 8\n" in text
    assert load_run_config([], [f"{s}={v}" for s, v in _as_overrides(text)]) == config
    swapped = _config(ranks={"down": 8, "layers.0.*": 24})
    (difference,) = differences_that_forbid_resume(config, swapped)
    assert difference[0] == "method.ranks"
    with pytest.raises(UserError, match=r"--allow method.ranks: method.ranks cannot change"):
        check_allowed(["method.ranks"])
    assert "trained: " in describe_parameters(config)
    assert describe_parameters(config) != describe_parameters(_config())
    check_run(config, 1)
    with pytest.raises(UserError, match=r"'layers.3.\*' = 500 is larger than"):
        check_run(_config(ranks={"layers.3.*": 500}), 1)
    with pytest.raises(UserError, match=r"method.ranks.q = 0: must be greater than or equal to 1"):
        load_run_config([], [f"{s}={v}" for s, v in _as_overrides(text)] + ["method.ranks={q: 0}"])


def _as_overrides(text: str) -> list[tuple[str, str]]:
    return [
        (f"{section}.{key}", json.dumps(value))
        for section, values in yaml.safe_load(text).items()
        for key, value in values.items()
    ]


def test_more_shapes_of_blocks_than_torch_expects_are_all_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = torch._dynamo.config.cache_size_limit + 2
    ranks = {f"layers.{n}.*": n + 1 for n in range(layers)}
    decoder = build_decoder(tiny(num_layers=layers), low_rank(ranks=ranks), seed=0)
    ids = torch.randint(0, 101, (1, 6))
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: plain(self, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", layers - 2)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = decoder(ids)
        compile_blocks(decoder)
        torch.testing.assert_close(decoder(ids), expected)
    assert counters["stats"]["unique_graphs"] >= layers
    torch._dynamo.reset()
