"""Model FLOPs: the multiplications and additions that the model's algebra needs."""

from __future__ import annotations

import torch

from megalr.layers.linear import DenseLinear, FactorizedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.decoder import Decoder
from megalr.sharding.tensor_shard import shard_of


def matrix_parameters(decoder: Decoder) -> int:
    """Weights that multiply every token: matrices of the blocks (factors where factorized) and
    the head, without padding. Embedding, norms and biases do not count.

    A LoRA layer multiplies by its frozen matrix and its factors. An SLTrain layer counts its
    factors and its sparse values, which is what its algebra needs; that it multiplies by the dense
    sum is how it is computed.
    """
    count = decoder.config.vocab_size * decoder.config.hidden_size
    for linear in decoder.linears():
        shape = linear.shape
        if isinstance(linear, FactorizedLinear):
            count += sum((shape.in_used + m) * linear.rank for m in shape.out_used)
        if isinstance(linear, SLTrainLinear):
            count += sum(linear.drawn)
        if isinstance(linear, DenseLinear | LoRALinear):
            count += sum(shape.in_used * m for m in shape.out_used)
    return count


def flops_per_token(decoder: Decoder, sequence_length: int) -> float:
    """FLOPs that training spends on one token: 3 forward passes, each 2 per weight + attention.

    The third, that of the weights' gradients, leaves out LoRA's frozen matrices, which have none.
    Attention counts the positions that causal masking keeps: (S + 1) / 2 on average (fewer with a
    sliding window), each 2 * 2 * h FLOPs for the scores and the weighted sum. Recomputation by
    activation checkpointing does not count: these are model FLOPs, not hardware FLOPs.
    """
    config = decoder.config
    S = sequence_length
    window = min(config.sliding_window or S, S)
    visible = (window * (window + 1) / 2 + (S - window) * window) / S
    attention = config.num_layers * 4 * config.hidden_size * visible
    frozen = sum(
        linear.shape.in_used * sum(linear.shape.out_used)
        for linear in decoder.linears()
        if isinstance(linear, LoRALinear)
    )
    return 3 * (2 * matrix_parameters(decoder) + attention) - 2 * frozen


def parameter_count(decoder: Decoder, trainable_only: bool = False) -> int:
    """Parameters of the unpadded model; a tied head counts once."""
    config = decoder.config
    stored = sum(
        _whole_numel(p) for p in decoder.parameters() if p.requires_grad or not trainable_only
    )
    spare_rows = config.padded_vocab_size - config.vocab_size
    padding = spare_rows * config.hidden_size * (1 if config.tie_embeddings else 2)
    for linear in decoder.linears():
        shape = linear.shape
        spare = [rows - used for rows, used in zip(shape.out_features, shape.out_used, strict=True)]
        if linear.bias is not None:
            padding += sum(spare)
        spare_columns = shape.in_features - shape.in_used
        if isinstance(linear, FactorizedLinear):
            padding += sum(spare) * linear.rank
            padding += spare_columns * linear.rank * len(shape.names)
        frozen = isinstance(linear, LoRALinear) and not trainable_only
        if isinstance(linear, DenseLinear) or frozen:
            padding += sum(spare) * shape.in_features + spare_columns * sum(shape.out_used)
    return stored - padding


def _whole_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter of which this rank may hold a part, or nothing (ZeRO-3)."""
    shard = shard_of(parameter)
    if shard is not None:
        return torch.Size(shard.full_shape).numel()
    return getattr(parameter, "ds_numel", parameter.numel())
