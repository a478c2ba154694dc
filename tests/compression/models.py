"""Tiny dense models of transformers whose matrices, norms and biases are all random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megalr.hf.modeling_factorized import TRANSFORMERS

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biases_tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
}


def tiny_model(name: str = "llama", **changes: Any) -> Any:
    """The causal language model, float32."""
    family, own = FAMILIES[name]
    values = {**COMMON, **own, **changes}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 44, "n_layer": 2, "n_head": 4, "n_positions": 32}
        kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        values = {**sizes, **{key: values[key] for key in kept}}
    torch.manual_seed(7)
    model: Any = TRANSFORMERS[family][2](TRANSFORMERS[family][0](**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def saved(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """The same in a folder."""
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The causal language model in a folder, by the code that the folder carries."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model.eval()


def sample(batch: int = 2, length: int = 20) -> torch.Tensor:
    """Token ids, the same in every test."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 101, (batch, length), generator=generator)
