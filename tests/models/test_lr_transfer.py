"""Coordinate check: with ``method.lr_transfer`` activations change alike at every width."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.checkpoint import open_checkpoint
from megalr.config.optimizers import LearningRateRatios
from megalr.config.schema import RunConfig
from megalr.engine.build import check_run
from megalr.errors import UserError
from megalr.hf.trained_run import load_decoder
from megalr.models.build import build_decoder, describe_parameters
from megalr.models.decoder import Decoder
from megalr.models.lr_transfer import scales_of
from megalr.optim.groups import parameter_groups
from tests.models.settings import low_rank, tiny
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero

WIDTHS = (64, 128, 256, 512)
BASE = SimpleNamespace(base_width=64, base_rank=16)
LR, STEPS = 4e-3, 4


def _model(width: int, rank: int, transfer: bool) -> tuple[Decoder, Any]:
    sizes = tiny(
        hidden_size=width,
        intermediate_size=2 * width,
        num_heads=width // 16,
        num_kv_heads=width // 16,
    )
    alpha = 32.0 if transfer else 2.0 * rank  # without the rule alpha / rank is kept
    method = low_rank(rank=rank, alpha=alpha, lr_transfer=BASE if transfer else None)
    return build_decoder(sizes, method, seed=1), method


def _keep(found: dict[str, torch.Tensor], name: str, _: Any, __: Any, outputs: Any) -> None:
    found[name] = outputs[-1]


def _activations(decoder: Decoder, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of the projections and the logits."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(partial(_keep, found, layer.shape.names[-1]))
        for layer in decoder.groups()
    ]
    with torch.no_grad():
        found["logits"] = decoder(ids)
    for hook in hooks:
        hook.remove()
    return found


def _changes(width: int, rank: int, transfer: bool) -> dict[str, float]:
    """Root mean square of each activation's change in a few updates by AdamW."""
    decoder, method = _model(width, rank, transfer)
    ratios = scales_of(method, width).ratios(LearningRateRatios())
    groups = parameter_groups(decoder, decoder.factor_parameters(), 0.0, ratios)
    for group in groups:
        group["lr"] = LR * group.pop("lr_ratio", 1.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    torch.manual_seed(0)
    ids = torch.randint(0, 101, (4, 17))
    before = _activations(decoder, ids[:, :-1])
    for _ in range(STEPS):
        loss = decoder(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = _activations(decoder, ids[:, :-1])
    return {name: float((after[name] - x).square().mean().sqrt()) for name, x in before.items()}


def _spreads(shapes: list[tuple[int, int]], transfer: bool) -> dict[str, float]:
    """Largest over smallest change of each activation over models of (width, rank)."""
    changes = [_changes(width, rank, transfer) for width, rank in shapes]
    return {n: max(c[n] for c in changes) / min(c[n] for c in changes) for n in changes[0]}


IN_PROPORTION = [(width, width // 4) for width in WIDTHS]


def test_changes_of_activations_do_not_depend_on_the_width() -> None:
    assert max(_spreads(IN_PROPORTION, True).values()) < 1.5
    without = _spreads(IN_PROPORTION, False).values()
    assert min(without) > 2 and max(without) > 10


def test_changes_of_activations_hardly_depend_on_the_rank() -> None:
    assert max(_spreads([(width, 16) for width in WIDTHS], True).values()) < 2.5
    assert max(_spreads([(256, rank) for rank in (16, 32, 64, 128)], True).values()) < 1.8


def test_the_base_itself_is_not_changed() -> None:
    plain, method = _model(64, 16, False)
    based, of_base = _model(64, 16, True)
    for (name, ours), theirs in zip(based.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [p.scale for p in based.factor_pairs()] == [p.scale for p in plain.factor_pairs()]
    given = LearningRateRatios(head=3.0)
    assert scales_of(of_base, 64).ratios(given) == scales_of(method, 64).ratios(given) == given


def test_another_width_and_rank_follow_the_rule_in_every_number() -> None:
    (plain, _), (other, method) = _model(256, 24, False), _model(256, 24, True)
    scales = {pair.scale for pair in other.factor_pairs()}
    assert scales == {32.0 / 16}
    ratios = scales_of(method, 256).ratios(LearningRateRatios(head=3.0, embedding=2.0))
    assert (ratios.factors, ratios.head, ratios.embedding, ratios.norms) == (0.25, 0.75, 2.0, 1.0)
    parameters = dict(other.named_parameters())
    for name, theirs in plain.named_parameters():
        factor = 0.25 if name == "head.weight" else 1.0
        torch.testing.assert_close(parameters[name], factor * theirs, rtol=1e-6, atol=0)
    method.ranks = {"down": 8}
    mixed = build_decoder(other.config, method, seed=1)
    assert {pair.scale for pair in mixed.factor_pairs()} == {32.0 / 16}


def _config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "model": {"preset": "llama_60m"},
        "method": {
            "name": "low_rank",
            "rank": 128,
            "alpha": 16.0,
            "lr_transfer": {"base_width": 256, "base_rank": 64},
        },
        "optimizer": {"lr": 4e-3},
        "data": {"train": "unused", "sequence_length": 64},
        "train": {"updates": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    merged = {name: {**values.get(name, {}), **sections.get(name, {})} for name in values}
    return RunConfig.model_validate(merged)


def test_a_run_has_and_prints_the_learning_rates_of_the_rule() -> None:
    groups = check_run(_config(), 1)
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates["factors"] == pytest.approx(2e-3) and rates["head"] == pytest.approx(2e-3)
    assert rates["matrices"] == rates["vectors"] == 4e-3
    printed = describe_parameters(_config())
    assert "# lr_transfer: alpha / r = 0.25; x 0.5: learning rates of factors and head" in printed
    assert "lr_transfer" not in describe_parameters(_config(method={"lr_transfer": None}))


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"optimizer": {"name": "muon"}}, "optimizer.name is muon: use optimizer.name=adamw"),
        ({"method": {"init": "full_rank_variance"}}, "but method.init is full_rank_variance: use"),
        ({"model": {"preset": None, "from_pretrained": "x"}}, "use model.from_pretrained=null"),
        ({"method": {"targets": ["o", "down"]}}, "lacks q, k, v, gate, up: use all targets"),
    ],
)
def test_what_the_rule_does_not_cover_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"method.lr_transfer: .*({message})"):
        _config(**sections)


def test_a_checkpoint_is_read_with_the_scale_it_was_trained_with(
    data: Path, tmp_path: Path
) -> None:
    method: dict[str, Any] = {"name": "low_rank", "rank": 8, "alpha": 16.0}
    method["lr_transfer"] = {"base_width": 24, "base_rank": 4}
    values = settings(tmp_path / "run", data, method=method, train={"updates": 3})
    run_distributed(run, 1, values, zero(1))
    decoder = load_decoder(tmp_path / "run", open_checkpoint(tmp_path / "run"))
    assert {pair.scale for pair in decoder.factor_pairs()} == {4.0}
    groups = events(tmp_path / "run", "start")[0]["parameter_groups"]
    assert groups["factors"]["lr"] == groups["head"]["lr"] == 0.005
    assert groups["matrices"]["lr"] == 0.01


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(UserError, match="gives embedding and head different learning rates"):
        check_run(_config(model={"tie_embeddings": True}), 1)
