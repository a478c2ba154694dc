"""Small models and data for the tests of the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """An embedding, blocks of two linears with biases and a norm, an untied head."""

    def __init__(self, width: int = 12, blocks: int = 2, vocabulary: int = 17) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """The same model for the same seed."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(update: int, rows: int = 6, length: int = 5, vocabulary: int = 17) -> torch.Tensor:
    """Token ids ``(rows, length)``, a function of the update."""
    generator = torch.Generator().manual_seed(1000 + update)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of a model that returns logits."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def llama(**sizes):
    """A small transformers model with untied embeddings, the same in every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        **sizes,
    )
    return LlamaForCausalLM(config)
