"""ReLoRA's merges keep the function, start new factors, and prune the moments they should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.engine.build import build_engine, set_learning_rate
from megalr.engine.config import resolve_deepspeed_config
from megalr.layers.lora import LoRALinear
from megalr.models.build import build_model
from megalr.restarts.relora import Relora
from tests.ranks import run_distributed
from tests.training.runs import losses, run, settings, zero


def _method(**changes: Any) -> SimpleNamespace:
    options = {"merge_every": 2, "reset_every": None, "reset": "random", "reset_fraction": 0.9}
    return SimpleNamespace(**{**options, **changes})


def _train_and_merge(values: dict, ds_user: dict, method: SimpleNamespace) -> dict[str, Any]:
    """Three updates, then the merge that is due after the third."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    config = RunConfig.model_validate(values)
    decoder = build_model(config, torch.device("cpu"))
    ds_config = resolve_deepspeed_config(config, ds_user, "test", dist.get_world_size())
    engine = build_engine(config, ds_config, decoder)
    layers = [linear for linear in decoder.linears() if isinstance(linear, LoRALinear)]
    relora = Relora(method, engine, layers, seed=1)
    ids = torch.arange(48).reshape(2, 24) + dist.get_rank()
    reports = []
    for update in (1, 2, 3):
        for _ in range(engine.gradient_accumulation_steps()):
            set_learning_rate(engine, 0.01)
            engine.backward(engine(ids, ids.roll(-1, 1), scale=0.01).clone(), scale_wrt_gas=False)
            engine.step()
        if update == 3:
            layer = layers[0]
            relora.state.relink()  # DeepSpeed links only the first group's states by itself
            before = {
                "logits": decoder(ids).detach().clone(),
                "b": layer.b.detach().clone(),
                "a": layer.a.detach().clone(),
                "w": layer.weight.detach().clone(),
                "m": safe_get_full_optimizer_state(layer.a, "exp_avg").clone(),
                "v": safe_get_full_optimizer_state(layer.b, "exp_avg_sq").clone(),
            }
        reports.append(relora.after_update(update))
    after = {
        "logits": decoder(ids).detach(),
        "b": layer.b.detach(),
        "a": layer.a.detach(),
        "a_master": safe_get_full_fp32_param(layer.a),
        "w": layer.weight.detach(),
        "m": safe_get_full_optimizer_state(layer.a, "exp_avg"),
        "v": safe_get_full_optimizer_state(layer.b, "exp_avg_sq"),
        "embedding": safe_get_full_optimizer_state(decoder.embedding.weight, "exp_avg"),
    }
    after = {key: value.detach().float().numpy().copy() for key, value in after.items()}
    before = {key: value.float().numpy() for key, value in before.items()}
    blocks = layer.a.row_blocks
    engine.destroy()
    return {"before": before, "after": after, "reports": reports, "blocks": blocks}


@pytest.mark.parametrize(
    "world_size, stage, precision", [(1, 1, "fp32"), (2, 1, "bf16"), (3, 2, "fp32")]
)
def test_merge_keeps_the_function_and_starts_new_factors(
    world_size: int, stage: int, precision: str, tmp_path: Path
) -> None:
    method = {"name": "lora", "rank": 8, "alpha": 16.0}
    values = settings(tmp_path, tmp_path, method=method, train={"precision": precision})
    results = run_distributed(_train_and_merge, world_size, values, zero(stage), _method())
    for result in results:
        before, after = result["before"], result["after"]
        assert result["reports"][:2] == [None, None]
        report = result["reports"][2]
        assert report.merged and report.matrices == 14
        tolerance = 1e-5 if precision == "fp32" else 0.05
        assert abs(after["logits"] - before["logits"]).max() < tolerance
        assert abs(before["b"]).max() > 1e-3 and not after["b"].any()
        assert (after["a"] != before["a"]).mean() > 0.99
        assert (after["w"] == results[0]["after"]["w"]).all()
        torch.testing.assert_close(
            torch.from_numpy(after["a"]), torch.from_numpy(after["a_master"]), rtol=4e-3, atol=0
        )
        if precision == "fp32":
            q = before["w"][:48] + 2.0 * before["b"][:48] @ before["a"][:8]
            assert abs(after["w"][:48] - q).max() < 1e-6
        # Random reset: nine of ten moment entries are gone, the others are as they were.
        assert report.fraction_reset == pytest.approx(0.9, abs=0.02)
        kept = after["m"] != 0
        assert kept.mean() == pytest.approx(0.1, abs=0.04)
        assert (after["m"][kept] == before["m"][kept]).all()
        assert after["embedding"].any()


def test_magnitude_reset_zeroes_the_smallest_entries_of_each_matrix(tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 8, "alpha": 16.0}
    values = settings(tmp_path, tmp_path, method=method)
    options = _method(reset="magnitude", reset_fraction=0.8, merge_every=50, reset_every=2)
    for result in run_distributed(_train_and_merge, 3, values, zero(2), options):
        assert not result["reports"][2].merged
        for _, start, stop in result["blocks"]:  # rows of A_q, A_k, A_v
            old = torch.from_numpy(result["before"]["m"][start:stop])
            new = torch.from_numpy(result["after"]["m"][start:stop])
            limit = torch.quantile(old.abs().flatten(), 0.8, interpolation="nearest")
            torch.testing.assert_close(new, torch.where(old.abs() > limit, old, 0.0))


@pytest.mark.long
def test_runs_with_magnitude_resets_agree_on_one_two_and_three_ranks(
    data: Path, tmp_path: Path
) -> None:
    method = {
        "name": "relora", "rank": 8, "alpha": 16.0, "merge_every": 3, "reset_every": 6,
        "reset": "magnitude", "reset_fraction": 0.8,
    }  # fmt: skip
    sections = {"method": method, "schedule": {"name": "constant", "warmup_updates": 2}}
    found = []
    for ranks, stage in ((1, 0), (1, 1), (2, 1), (3, 2)):
        folder = tmp_path / f"{ranks}_{stage}"
        values = settings(folder, data, **sections, train={"updates": 12})
        run_distributed(run, ranks, values, zero(stage))
        found.append(losses(folder))
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=1e-6)
    # The reset after update 7 does not throw the run back.
    assert max(found[0][7:]) <= found[0][6]
