"""Method settings and tiny sizes that tests of the model share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megalr.config.schema import RunConfig
from megalr.models.config import DecoderConfig

GPT2: dict[str, Any] = {
    "num_kv_heads": None,
    "intermediate_size": 192,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "positions": "learned",
    "max_positions": 32,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "attention_bias": True,
    "output_bias": True,
}
"""Changes that make ``tiny`` a GPT-2."""
ALL_TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


def tiny(**changes: Any) -> DecoderConfig:
    """A decoder with every size odd or uneven enough to catch mixed-up dimensions."""
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 83,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "vocab_size": 101,
        "pad_multiple": 16,
    }
    return DecoderConfig(**{**sizes, **changes})


def run_of(model: dict[str, Any], method: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a run with this section ``model``; sequences of 32 tokens."""
    values = {
        "run": {"dir": "runs/x"},
        "model": model,
        "method": method or {"name": "full_rank"},
        "optimizer": {"lr": 1e-3},
        "data": {"train": "data/x", "sequence_length": 32},
        "train": {"updates": 2, "global_batch_size": 2, "micro_batch_size": 1},
    }
    return RunConfig.model_validate(values)


def full_rank() -> SimpleNamespace:
    """Settings of the dense method."""
    return SimpleNamespace(name="full_rank")


def low_rank(rank: int = 8, **changes: Any) -> SimpleNamespace:
    """Settings of the low-rank method."""
    options = {"alpha": 16.0, "init": "kaiming", "targets": ALL_TARGETS}
    return SimpleNamespace(name="low_rank", rank=rank, **{**options, **changes})


def mixed(method: SimpleNamespace, **changes: Any) -> SimpleNamespace:
    """The same method with ranks that differ inside of groups and from layer to layer."""
    ranks = {"q": 4, "layers.1.*": 12, "mlp.down": 6, "layers.1.mlp.up": 3}
    return SimpleNamespace(**{**vars(method), "ranks": ranks, **changes})


def factorized(name: str, rank: int = 8, **changes: Any) -> SimpleNamespace:
    """Settings of another method with factors."""
    options = {"alpha": 16.0, "density": 0.1, "targets": ALL_TARGETS}
    return SimpleNamespace(name=name, rank=rank, **{**options, **changes})
