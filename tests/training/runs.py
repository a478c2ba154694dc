"""Tiny runs that tests of training share: configuration, start in a worker, reading of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalr.config.schema import RunConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "preset": "llama_9m",
        "hidden_size": 48,
        "intermediate_size": 83,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 120,
        "pad_multiple": 16,
    },
    "method": {"name": "low_rank", "rank": 8, "alpha": 16.0},
    "optimizer": {"lr": 0.01, "weight_decay": 0.1},
    "schedule": {"warmup_updates": 3},
    "data": {"sequence_length": 24},
    "train": {
        "updates": 10,
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "precision": "fp32",
        "gradient_clipping": 0.5,
    },
    "evaluation": {"every": 5},
    "checkpoint": {"every": 5},
    "log": {"every": 1, "tensorboard": False},
}


def settings(folder: Path, dataset: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """SETTINGS with a run folder, data and some keys changed."""
    values = {name: {**section, **sections.get(name, {})} for name, section in SETTINGS.items()}
    if "name" in sections.get("method", {}):
        values["method"] = sections["method"]
    for name in sections.keys() - values.keys():
        values[name] = sections[name]
    values["run"] = {"dir": str(folder), **sections.get("run", {})}
    values["data"]["train"] = sections.get("data", {}).get("train", str(dataset))
    return values


def run(values: dict[str, Any], ds_user: dict[str, Any]) -> None:
    """Pretrain on this rank; to be called on every rank of a worker pool."""
    from megalr.training.pretrain import pretrain

    pretrain(RunConfig.model_validate(values), ds_user, "test.json")


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """A DeepSpeed JSON with this ZeRO stage."""
    return {"zero_optimization": {"stage": stage, **options}}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    """Training loss by update; later lines replace earlier ones of the same update."""
    return list({event["update"]: event["loss"] for event in events(folder, "step")}.values())
