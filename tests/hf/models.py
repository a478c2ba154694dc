"""Decoders whose every number counts: nothing is zero that is not padding."""

from __future__ import annotations

from typing import Any

import torch

from megalr.layers.linear import FactorizedLinear
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from tests.models.settings import tiny

GPT2: dict[str, Any] = {
    "num_kv_heads": None,
    "intermediate_size": 192,
    "norm": "layer",
    "norm_eps": 1e-5,
    "positions": "learned",
    "max_positions": 32,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "attention_bias": True,
    "output_bias": True,
}
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
        for layer in decoder.linears():
            for index in range(len(layer.shape.names)):
                rows = layer.used_rows(index)
                if layer.bias is not None:
                    layer.bias[rows] = 0.3 * torch.randn_like(layer.bias[rows])
                if isinstance(layer, FactorizedLinear):
                    layer.b[rows] = 0.1 * torch.randn_like(layer.b[rows])
    return decoder.eval()
