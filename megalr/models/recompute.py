"""What the backward pass of a block computes again instead of keeping it.

Which results of a block are kept is decided operator by operator (torch's selective activation
checkpointing, as in torchtitan), so that a level means the same eagerly and compiled:

| level | kept besides the block's input | computed again |
|---|---|---|
| elementwise | products with weights, attention | norms, activations, sums |
| mlp | the vectors between factors, q, k, v, attention | products with B of o, gate, up too |
| bottleneck | the vectors between factors: 7 r numbers a token | attention, products with B |
| full | nothing | everything |

``mlp`` and ``bottleneck`` need layers that are their two factors and nothing else. Sums over
tensor-parallel ranks are never repeated in compiled blocks, except with ``full``. Compare CoLA-M
(arXiv 2502.10940) and the recomputation of arXiv 2512.12131.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

LEVELS = ("none", "elementwise", "mlp", "bottleneck", "full")
SELECTIVE = ("elementwise", "mlp", "bottleneck")
FOR_FACTORS = ("mlp", "bottleneck")
"""Levels that need layers which are their two factors."""

PRODUCTS = ("aten::mm", "aten::addmm", "megalr::sparse_low_rank", "megalr::swiglu_product")
"""Products with weights, but those with B of factorized layers, which are megalr::expand."""


def recomputed(
    function: Callable[..., Any],
    *inputs: Any,
    level: str,
    read_by_attention: tuple[int, ...],
) -> Any:
    """``function(*inputs)``, of which the backward pass keeps what ``level`` says.

    Args:
        function: the forward pass of a block; nothing random happens inside.
        inputs: what it reads, kept.
        level: all but none.
        read_by_attention: sizes of the outputs of q, k, v, by which their product is known.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if level in SELECTIVE:
        choice = partial(_keep, level, read_by_attention)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, choice)
    return checkpoint(function, *inputs, **options)


def _keep(
    level: str, read_by_attention: tuple[int, ...], _: Any, operator: Any, *inputs: Any, **__: Any
) -> CheckpointPolicy:
    """Whether the result of an operator is kept."""
    name = operator.name().split(".")[0]
    if name in PRODUCTS or name.startswith("_c10d_functional::"):
        kept = True
    elif "scaled_dot_product" in name or name == "megalr::causal_attention":
        kept = level != "bottleneck"
    elif name == "megalr::expand":
        mine = tuple(inputs[2]) == read_by_attention
        kept = level == "elementwise" or (level == "mlp" and mine)
    else:
        kept = False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
