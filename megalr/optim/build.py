"""From the run's ``optimizer`` section to a torch optimizer that DeepSpeed wraps."""

from __future__ import annotations

from typing import Any

import torch


def build_optimizer(settings: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over ``groups`` (see optim.groups).

    ``adamw`` is torch's fused AdamW (decoupled decay, epsilon outside the bias correction), on
    CUDA and on the CPU (offload). The learning rate is 0 until the loop sets it before every
    update, so that nothing the engine does before the first one can change a weight.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
