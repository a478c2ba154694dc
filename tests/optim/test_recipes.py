"""The recipes of the methods and optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalr.config import load_run_config
from megalr.config.resuming import diff_configs
from megalr.engine.config import read_deepspeed_json, resolve_deepspeed_config
from megalr.models.config import PRESETS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
OPTIONS = {"ranks": "ranks", "lr_transfer": "lr_transfer", "dlr": "dlr_alpha"}
"""Endings of names that stand for a key of the method."""
SIZES = ("60m", "130m", "350m", "1b")

# Published values by model size: 60M, 130M, 350M, 1B.
PUBLISHED = {
    "galore": {"rank": (128, 256, 256, 1024), "scale": (0.25,) * 4, "update_proj_gap": (200,) * 4},
    "fira": {"rank": (128, 256, 256, 512), "scale": (0.25, 0.25, 0.25, 0.0625)},
    "apollo": {"rank": (128, 192, 256, 256), "scale_type": ("channel",) * 4},
    "apollo_mini": {
        "rank": (1,) * 4, "scale": (128, 192, 128, 128), "scale_front": (True, True, False, False)
    },
    "loro": {"rank": (128, 256, 256, 512), "exact_every": (500, 500, 500, 200)},
}  # fmt: skip
RATES = {
    "galore": (0.01,) * 4,
    "fira": (0.01,) * 4,
    "apollo": (0.01,) * 4,
    "apollo_mini": (0.01,) * 4,
    "loro": (0.01, 0.01, 0.01, 0.005),
    "spam": (1e-3, 8e-4, 4e-4, 2e-3),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_batch_can_be_cut(path):
    config = load_run_config([path], presets=PRESETS)
    assert config.run.dir == f"runs/{path.stem}"
    name = path.stem.split("_", 2)[2]
    assert (config.restarts.every == 200) == name.endswith("_restarts")
    name = name.removesuffix("_restarts")
    for option, key in OPTIONS.items():
        assert bool(getattr(config.method, key, None)) == name.endswith(f"_{option}")
        name = name.removesuffix(f"_{option}")
    assert name in (config.method.name, config.optimizer.name)
    for ranks in (1, 2, 4):
        user = read_deepspeed_json(ROOT / "ds_configs" / "zero1.json")
        resolve_deepspeed_config(config, user, "zero1.json", ranks)
    assert (config.train.global_batch_size, config.data.sequence_length) == (512, 256)


@pytest.mark.parametrize("name", list(RATES))
def test_published_settings_are_followed_at_every_size(name):
    for i, size in enumerate(SIZES):
        config = load_run_config([ROOT / "recipes" / "methods" / f"llama_{size}_{name}.yaml"])
        assert config.optimizer.lr == RATES[name][i]
        for key, values in PUBLISHED.get(name, {}).items():
            assert getattr(config.method, key) == values[i]
        updates = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000}[size]
        assert config.train.updates == (20_000 if (name, size) == ("spam", "1b") else updates)


def test_sltrain_recipes_follow_its_scripts():
    """Rank, alpha, updates and warm-up by size; density 0.03, learning rate 3e-3."""
    published = {
        "60m": (128, 32, 11_000, 1_100),
        "130m": (256, 16, 22_000, 2_200),
        "350m": (256, 16, 65_000, 6_500),
        "1b": (512, 8, 140_000, 10_000),
    }
    for size, expected in published.items():
        config = load_run_config([ROOT / "recipes" / "methods" / f"llama_{size}_sltrain.yaml"])
        method, train = config.method, config.train
        warmup = config.schedule.warmup_updates
        assert (method.rank, method.alpha, train.updates, warmup) == expected
        assert method.density == 0.03 and config.optimizer.lr == 3e-3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", ["llama_{}_low_rank", "methods/llama_{}_sltrain"])
def test_a_recipe_with_restarts_differs_from_the_one_without_in_nothing_else(base, size):
    plain = ROOT / "recipes" / f"{base.format(size)}.yaml"
    name = f"{plain.stem}_restarts.yaml"
    restarted = load_run_config([ROOT / "recipes" / "methods" / name])
    assert restarted.restarts.refactorize_period == restarted.restarts.reset_period == 200
    different = {
        key.split(".")[0] for key, _, _ in diff_configs(load_run_config([plain]), restarted)
    }
    assert different == {"run", "restarts"}
