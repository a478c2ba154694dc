"""Which tensor of a transformers LLaMA/Mistral/Qwen2 model is which tensor of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalr.layers.linear import GroupedLinear
from megalr.models.decoder import Block, Decoder

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _block_linears(block: Block, prefix: str) -> Iterator[tuple[str, GroupedLinear, int]]:
    """``(transformers name without .weight, layer, index of the matrix in its group)``."""
    for layer, part, names in (
        (block.attention.qkv, "self_attn", ATTENTION),
        (block.attention.o, "self_attn", ATTENTION),
        (block.mlp.into, "mlp", MLP),
        (block.mlp.down, "mlp", MLP),
    ):
        for index, name in enumerate(layer.shape.names):
            yield f"{prefix}.{part}.{names[name.rsplit('.', 1)[1]]}", layer, index


def dense_state_dict(decoder: Decoder) -> dict[str, torch.Tensor]:
    """All weights under transformers' LLaMA names, dense, without padding, float32.

    Factorized matrices are multiplied out in float32. Shapes are those of transformers:
    ``(out, in)`` for matrices, ``(V, h)`` for embedding and head.
    """
    V = decoder.config.vocab_size
    state = {
        "model.embed_tokens.weight": decoder.embedding.weight.detach()[:V].float(),
        "model.norm.weight": decoder.norm.weight.detach().float(),
    }
    if not decoder.config.tie_embeddings:
        state["lm_head.weight"] = decoder.head.weight.detach()[:V].float()
    for number, block in enumerate(decoder.blocks()):
        prefix = f"model.layers.{number}"
        state[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight.detach().float()
        state[f"{prefix}.post_attention_layernorm.weight"] = block.mlp_norm.weight.detach().float()
        for name, layer, index in _block_linears(block, prefix):
            state[f"{name}.weight"] = layer.dense_weight(index)
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias.detach()[layer.used_rows(index)].float()
    return state


@torch.no_grad()
def load_dense_state_dict(decoder: Decoder, state: dict[str, torch.Tensor]) -> None:
    """Set all weights from a dense state dict under transformers' LLaMA names.

    Dense layers take the matrices as they are, factorized ones their best rank-r approximation.
    """
    V = decoder.config.vocab_size
    decoder.embedding.weight[:V] = state["model.embed_tokens.weight"].to(decoder.embedding.weight)
    decoder.norm.weight.copy_(state["model.norm.weight"])
    if not decoder.config.tie_embeddings:
        decoder.head.weight[:V] = state["lm_head.weight"].to(decoder.head.weight)
    for number, block in enumerate(decoder.blocks()):
        prefix = f"model.layers.{number}"
        block.attention_norm.weight.copy_(state[f"{prefix}.input_layernorm.weight"])
        block.mlp_norm.weight.copy_(state[f"{prefix}.post_attention_layernorm.weight"])
        for name, layer, index in _block_linears(block, prefix):
            layer.load_dense(index, state[f"{name}.weight"])
            if layer.bias is not None:
                layer.bias[layer.used_rows(index)] = state[f"{name}.bias"].to(layer.bias)
