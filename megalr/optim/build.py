"""From a run's ``optimizer`` and ``method`` sections to the optimizer that DeepSpeed wraps."""

from __future__ import annotations

from typing import Any

import torch

from megalr.kernels.adamw import AdamW
from megalr.optim.methods import Groups, RunFacts, make_optimizer


def build_optimizer(
    settings: Any, method: Any, groups: Groups, facts: RunFacts
) -> torch.optim.Optimizer:
    """The optimizer over ``groups`` (see optim.groups).

    Plain ``adamw`` is torch's fused AdamW (decoupled decay, epsilon outside the bias correction),
    on CUDA and on the CPU (offload), with a custom kernel for bf16 states (see kernels.adamw);
    everything else is this package's (see optim.methods). The learning rate is 0 until the loop
    sets it before every update, so that nothing the engine does before the first one can change a
    weight.

    Raises:
        UserError: a method and an optimizer that do not go together, a rank beyond a matrix.
    """
    optimizer: torch.optim.Optimizer | None = make_optimizer(settings, method, groups, facts)
    if optimizer is None:
        options = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
        if facts.bf16_states and facts.kernels:
            optimizer = AdamW(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer
