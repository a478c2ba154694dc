"""Model FLOPs and parameters: the arithmetic that the model's algebra needs, without padding."""

from __future__ import annotations

from megalr.models.decoder import Decoder


def matrix_parameters(decoder: Decoder) -> int:
    """Weights that multiply each token, without padding.

    They are the matrices of the blocks (factors where factorized) and the head, on all ranks.
    Embedding, norms and biases do not count.

    A LoRA layer multiplies by its frozen matrix and its factors. An SLTrain layer counts its
    factors and its sparse values, the cost of its algebra, although the implementation multiplies
    by their dense sum.
    """
    blocks = sum(linear.weight_count() for linear in decoder.linears())
    return decoder.config.vocab_size * decoder.config.hidden_size + blocks


def flops_per_token(decoder: Decoder, sequence_length: int, visible: float | None = None) -> float:
    """FLOPs that training spends on one token: 3 forward passes, each 2 per weight + attention.

    The third, for the gradients of the weights, skips LoRA's frozen matrices, which have none.
    Attention counts the positions that causal masking keeps: (S + 1) / 2 on average (fewer in a
    layer with a sliding window), each 2 * 2 FLOPs per dimension of all query heads for the scores
    and the weighted sum. Rotations and norms do not count. Recomputation by
    activation checkpointing does not count: these are model FLOPs, not hardware FLOPs (PaLM,
    arXiv 2204.02311, appendix B).

    Args:
        decoder: gives the sizes.
        sequence_length: S, tokens of a sequence.
        visible: positions that a position sees on average, itself included, where documents end
            inside of sequences; None: those of causal masking.
    """
    config = decoder.config
    S = sequence_length
    if visible is None:
        each = [_visible(S, config.window(layer)) for layer in range(config.num_layers)]
        visible = sum(each) / config.num_layers
    attention = config.num_layers * 4 * config.q_width * visible
    frozen = sum(linear.frozen_weight_count() for linear in decoder.linears())
    return 3 * (2 * matrix_parameters(decoder) + attention) - 2 * frozen


def _visible(S: int, window: int | None) -> float:
    """Mean number of positions that one of S sees, itself included."""
    window = min(window or S, S)
    return (window * (window + 1) / 2 + (S - window) * window) / S


def parameter_count(decoder: Decoder, trainable_only: bool = False) -> int:
    """Parameters of the whole model on all ranks, without padding; a tied head counts once.

    Computed from the sizes: a rank may hold a shard of a parameter, or nothing of it.

    Args:
        decoder: gives the sizes.
        trainable_only: without LoRA's frozen matrices.
    """
    config = decoder.config
    count = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    count += config.position_rows * config.hidden_size
    vectors = 1 if config.norm == "rmsnorm" else 2  # LayerNorm has a bias
    count += (2 * config.num_layers + 1) * vectors * config.hidden_size
    count += config.num_layers * sum(config.qk_norm_widths)
    for linear in decoder.groups():
        count += linear.weight_count()
        if linear.bias is not None:
            count += sum(linear.shape.out_used)
        if trainable_only:
            count -= linear.frozen_weight_count()
    return count
