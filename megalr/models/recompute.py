"""Activation checkpointing: which results of a block are kept and which are recomputed.

The choice is made operator by operator (torch's selective activation checkpointing, as in
torchtitan), so that a level means the same eagerly and compiled:

| level | kept besides the block's input | recomputed |
|---|---|---|
| elementwise | products with weights, attention | norms, activations, sums |
| mlp | the vectors between factors, q, k, v, attention | products with B of o, gate, up too |
| bottleneck | the vectors between factors: 7 r numbers per token | attention, products with B |
| full | nothing | everything |

``mlp`` and ``bottleneck`` need layers that are two factors and nothing else. Compiled blocks never
repeat sums over tensor-parallel ranks, except with ``full``. Compare CoLA-M (arXiv 2502.10940) and
the recomputation of arXiv 2512.12131.
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
"""Levels that need layers which are two factors and nothing else."""

PRODUCTS = ("aten::mm", "aten::addmm", "megalr::sparse_low_rank", "megalr::swiglu_product")
"""Products with weights, except those with the factors B, which are megalr::up_project."""


ATTENTION = ("megalr::causal_attention", "flex_attention")
"""Attention by other operators than scaled_dot_product_attention's."""


def recomputed(
    function: Callable[..., Any],
    *inputs: Any,
    level: str,
    qkv_sizes: tuple[int, ...],
) -> Any:
    """``function(*inputs)``, keeping for the backward pass what ``level`` says.

    Args:
        function: the forward pass of a block, without random numbers.
        inputs: its arguments, which are kept.
        level: one of LEVELS except none.
        qkv_sizes: widths of q, k, v, which identify the operator that computes them.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if level in SELECTIVE:
        policy = partial(_policy, level, qkv_sizes)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *inputs, **options)


def _policy(
    level: str, qkv_sizes: tuple[int, ...], _: Any, operator: Any, *inputs: Any, **__: Any
) -> CheckpointPolicy:
    """Whether the result of an operator is kept."""
    name = operator.name().split(".")[0]
    if name in PRODUCTS or name.startswith("_c10d_functional::"):
        kept = True
    elif "scaled_dot_product" in name or name in ATTENTION:
        kept = level != "bottleneck"
    elif name == "megalr::up_project":
        is_qkv = tuple(inputs[2]) == qkv_sizes
        kept = level == "elementwise" or (level == "mlp" and is_qkv)
    else:
        kept = False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
