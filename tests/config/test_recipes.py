"""Every shipped recipe is a valid configuration that a shipped DeepSpeed JSON can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalr.config import load_run_config
from megalr.config.resuming import diff_configs
from megalr.engine.config import read_deepspeed_json, resolve_deepspeed_config
from megalr.estimate.tensors import TRAINED, count, stored_tensors
from megalr.models.config import PRESETS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SIZES = ("9m", "20m", "60m", "130m", "350m", "1b", "3b", "7b")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_batch_can_be_cut_for_one_two_and_four_ranks(path: Path) -> None:
    config = load_run_config([path], presets=PRESETS)
    assert config.run.dir == f"runs/{path.stem}"
    assert ("low_rank" in path.stem or path.stem == "quickstart") == (
        config.method.name == "low_rank"
    )
    for ranks in (1, 2) if path.stem == "quickstart" else (1, 2, 4):
        user = read_deepspeed_json(ROOT / "ds_configs" / "zero2.json")
        resolved = resolve_deepspeed_config(config, user, "zero2.json", ranks)
        assert resolved["gradient_accumulation_steps"] * ranks * config.train.micro_batch_size == (
            config.train.global_batch_size
        )


def test_there_is_a_full_rank_and_a_low_rank_recipe_for_every_size() -> None:
    names = {path.stem for path in RECIPES}
    for size in SIZES:
        assert {f"llama_{size}", f"llama_{size}_low_rank"} <= names


@pytest.mark.parametrize("name", ["qwen3_0.6b", "qwen3_1.7b", "llama3_8b"])
def test_recipes_of_newer_families_are_alike_but_for_the_factors(name: str) -> None:
    dense, factors = (
        load_run_config([ROOT / "recipes" / f"{stem}.yaml"], presets=PRESETS)
        for stem in (name, f"{name}_low_rank")
    )
    assert dense.data.sequence_length == 2048 and dense.data.packing
    assert factors.method.rank == PRESETS[name].hidden_size // 4
    assert factors.method.alpha / factors.method.rank == 32 / 128
    for section in ("model", "schedule", "data", "train", "evaluation"):
        assert getattr(dense, section) == getattr(factors, section)
    sizes = PRESETS[name]
    tokens = dense.train.updates * dense.train.global_batch_size * dense.data.sequence_length
    stored = stored_tensors(sizes, dense.method)
    assert tokens == pytest.approx(20 * count(stored, sizes.num_layers, *TRAINED), rel=0.05)


def test_the_one_published_low_rank_script_is_followed() -> None:
    config = load_run_config([ROOT / "recipes" / "llama_60m_low_rank.yaml"])
    method, optimizer, train = config.method, config.optimizer, config.train
    assert method.name == "low_rank" and (method.rank, method.alpha) == (128, 32)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas) == (1.5e-3, 0, (0.9, 0.999))
    assert (train.updates, config.schedule.warmup_updates) == (11000, 1100)
    assert (train.global_batch_size, config.data.sequence_length) == (512, 256)
    assert (train.gradient_clipping, config.schedule.min_lr_ratio) == (0, 0.1)
    assert config.schedule.name == "cosine" and not config.data.packing


def test_the_recipe_with_restarts_of_20m_has_nothing_else_of_its_own() -> None:
    plain, restarts = (
        load_run_config([ROOT / "recipes" / f"llama_20m_low_rank{end}.yaml"], presets=PRESETS)
        for end in ("", "_restarts")
    )
    assert {key for key, *_ in diff_configs(plain, restarts)} == {
        "run.dir",
        "restarts.imbalance_threshold",
        "restarts.lr_recovery",
    }
