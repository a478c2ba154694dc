"""Meshes and cases that tests of tensor parallelism share."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.mesh import Mesh, make_mesh
from tests.models.settings import factorized, full_rank, low_rank, mixed, tiny

CASES: dict[str, tuple[SimpleNamespace, str]] = {
    "full_rank": (full_rank(), "column_row"),
    "low_rank": (low_rank(), "column_row"),
    "sltrain": (factorized("sltrain"), "column_row"),
    "lora": (factorized("lora"), "column_row"),
    "cola": (factorized("cola"), "column_row"),
    "some_targets": (low_rank(targets=["q", "k", "v", "down"]), "column_row"),
    "low_rank_bottleneck": (low_rank(), "bottleneck"),
    "cola_bottleneck": (factorized("cola"), "bottleneck"),
    "mixed_ranks": (mixed(low_rank()), "column_row"),
    "mixed_ranks_sltrain": (mixed(factorized("sltrain")), "column_row"),
    "mixed_ranks_bottleneck": (mixed(low_rank()), "bottleneck"),
    "dlr": (low_rank(dlr_alpha=0.7), "column_row"),
    "dlr_bottleneck": (low_rank(dlr_alpha=0.7), "bottleneck"),
    "dlr_cola": (factorized("cola", dlr_alpha=0.7), "column_row"),
    "head_norms": (full_rank(), "column_row"),
    "full_norms": (low_rank(), "column_row"),
    "head_norms_bottleneck": (low_rank(), "bottleneck"),
    "full_norms_bottleneck": (low_rank(), "bottleneck"),
}
"""Every kind of layer in every layout that it has, and norms of q and k."""

FEATURES = {
    "head_norms": {"qk_norm": "head", "head_dim": 16, "rope_layers": (False, True)},
    "full_norms": {"qk_norm": "full", "norm_order": "post", "head_dim": 20, "num_kv_heads": 4},
    "head_norms_bottleneck": {
        "qk_norm": "head",
        "sliding_window": 4,
        "window_layers": (True, False),
        "partial_rotary_factor": 0.5,
    },
    "full_norms_bottleneck": {"qk_norm": "full", "norm_order": "post", "num_heads": 8},
}
"""Features of the decoder by case."""


@lru_cache
def mesh(tensor: int) -> Mesh:
    """The mesh of the pool that calls it; every rank must call it in the same order."""
    return make_mesh(tensor, "cpu")


def sizes(name: str) -> DecoderConfig:
    """A tiny decoder for a case: biases, a tied head or LayerNorm where the layout has them."""
    changes = {"num_heads": 4, "num_kv_heads": 4, "attention_bias": True, "output_bias": True}
    if name == "lora":
        changes |= {"tie_embeddings": True}
    if name == "cola":
        changes |= {"norm": "layernorm", "positions": "learned", "max_positions": 16}
    return tiny(**{**changes, **FEATURES.get(name, {})})
