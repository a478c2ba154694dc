"""Decoders whose every number counts: nothing is zero that is not padding."""

from __future__ import annotations

from typing import Any

import torch

from megalr.config.model import RopeScaling
from megalr.layers.linear import FactorizedLinear
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from tests.models.settings import GPT2, tiny

FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"rope_theta": 5e5}, "LlamaForCausalLM"),
    "llama_tied": ({"tie_embeddings": True, "num_kv_heads": None}, "LlamaForCausalLM"),
    "llama_biases": (
        {"attention_bias": True, "output_bias": True, "activation": "relu"},
        "LlamaForCausalLM",
    ),
    "mistral": ({"sliding_window": 5}, "MistralForCausalLM"),
    "qwen2": ({"attention_bias": True, "tie_embeddings": True}, "Qwen2ForCausalLM"),
    "qwen2_window": ({"attention_bias": True, "sliding_window": 5}, "Qwen2ForCausalLM"),
    "qwen2_some_windows": (
        {
            "attention_bias": True,
            "num_layers": 4,
            "sliding_window": 5,
            "window_layers": (False, True),
            "rope_scaling": RopeScaling(type="linear", factor=2.0),
        },
        "Qwen2ForCausalLM",
    ),
    "llama_3.2": (
        {
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling(
                type="llama3",
                factor=8.0,
                original_max_positions=512,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
            "tie_embeddings": True,
        },
        "LlamaForCausalLM",
    ),
    "mistral_nemo": ({"hidden_size": 50, "head_dim": 12}, "MistralForCausalLM"),
    "qwen3": (
        {"qk_norm": "head", "head_dim": 16, "tie_embeddings": True},
        "Qwen3ForCausalLM",
    ),
    "qwen3_yarn": (
        {
            "qk_norm": "head",
            "rope_scaling": RopeScaling(
                type="yarn", factor=4.0, original_max_positions=64, beta_fast=16.0
            ),
        },
        "Qwen3ForCausalLM",
    ),
    "smollm3": (
        {
            "num_layers": 4,
            "rope_layers": (True, False),
            "sliding_window": 6,
            "window_layers": (False, True),
            "head_dim": 12,
        },
        "SmolLM3ForCausalLM",
    ),
    "olmo2": ({"qk_norm": "full", "norm_order": "post", "head_dim": 12}, "Olmo2ForCausalLM"),
    "phi3": (
        {"partial_rotary_factor": 0.75, "head_dim": 16, "sliding_window": 7},
        "Phi3ForCausalLM",
    ),
    "gpt2": ({**GPT2, "tie_embeddings": True}, "GPT2LMHeadModel"),
    "gpt2_untied": (GPT2, "GPT2LMHeadModel"),
}


def lively(method: Any, **changes: Any) -> Decoder:
    """A tiny decoder with random norms, biases and second factors; padding stays zero."""
    decoder = build_decoder(tiny(**changes), method, seed=3)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        for layer in decoder.groups():
            for index in range(len(layer.shape.names)):
                rows = layer.used_rows(index)
                if layer.bias is not None:
                    layer.bias[rows] = 0.3 * torch.randn_like(layer.bias[rows])
                stored, place = layer.layer_of(index)
                if isinstance(stored, FactorizedLinear):
                    rows = stored.used_rows(place)
                    stored.b[rows] = 0.1 * torch.randn_like(stored.b[rows])
    return decoder.eval()
