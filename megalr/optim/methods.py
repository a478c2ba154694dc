"""From the ``optimizer`` and ``method`` sections of a run to an optimizer over its groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalr.errors import UserError
from megalr.optim.apollo import Apollo, ApolloMini
from megalr.optim.base import ShardedOptimizer
from megalr.optim.galore import Fira, GaLore
from megalr.optim.golore import GoLore
from megalr.optim.loro import LORO
from megalr.optim.muon import Muon
from megalr.optim.spam import SPAM
from megalr.optim.stable_spam import StableSPAM

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """What some rules need to know of the run.

    ``bf16_states``: moments in bf16 (``train.precision: paper_bf16``) instead of fp32.
    ``kernels``: whether AdamW may use a kernel of ours (``train.kernels: auto``).
    """

    total_updates: int
    hidden_size: int
    seed: int
    bf16_states: bool = False
    kernels: bool = True

    @property
    def state_dtype(self) -> torch.dtype | None:
        """Dtype of moments as the optimizers take it."""
        return torch.bfloat16 if self.bf16_states else None


def split_targets(groups: Groups, targets: tuple[str, ...] | None) -> Groups:
    """Move target matrices out of the group ``matrices`` into one named ``targets``, before it.

    Target matrices are the parameters with ``row_blocks`` (embedding and head have none).
    ``targets`` are the last parts of their names; None means all. A parameter that stores several
    matrices must be a target as a whole.
    """
    result: Groups = []
    for group in groups:
        chosen = [
            p for p in group["params"] if group["name"] == "matrices" and _is_target(p, targets)
        ]
        ids = {id(p) for p in chosen}
        rest = [p for p in group["params"] if id(p) not in ids]
        if chosen:
            result.append({**group, "name": "targets", "params": chosen})
        if rest:
            result.append({**group, "params": rest})
    return result


def _is_target(parameter: torch.Tensor, targets: tuple[str, ...] | None) -> bool:
    blocks = getattr(parameter, "row_blocks", None)
    if not blocks:
        return False
    names = [name.rsplit(".", 1)[-1] for name, _, _ in blocks]
    chosen = [name for name in names if targets is None or name in targets]
    if chosen and len(chosen) < len(names):
        raise UserError(
            f"method.targets names {', '.join(chosen)} but not "
            f"{', '.join(n for n in names if n not in chosen)}: {', '.join(names)} are stored "
            "together, so name all of them or none"
        )
    return bool(chosen)


def make_optimizer(
    optimizer: Any, method: Any, groups: Groups, facts: RunFacts
) -> ShardedOptimizer | None:
    """The optimizer of this package that the run asks for; None when it is plain AdamW.

    ``groups`` are those of :func:`megalr.optim.groups.parameter_groups`. Raises UserError for a
    method that brings its own rule together with another optimizer than adamw, for ranks beyond a
    matrix, and for targets that split a stacked parameter.
    """
    if method.name in _METHODS:
        if optimizer.name != "adamw":
            raise UserError(
                f"method.name={method.name} brings its own update rule: optimizer.name must be "
                f"adamw, got {optimizer.name}"
            )
        return _METHODS[method.name](optimizer, method, groups, facts)
    if optimizer.name in _OPTIMIZERS:
        return _OPTIMIZERS[optimizer.name](optimizer, groups, facts)
    return None


def _given(section: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


def _spam(settings: Any, groups: Groups, facts: RunFacts) -> ShardedOptimizer:
    density = {"density": settings.density}
    groups = [
        {**g, **density} if g["name"] == "targets" else g for g in split_targets(groups, None)
    ]
    names = ("lr", "betas", "eps", "threshold", "update_gap", "warmup_epoch", "grad_accu_steps")
    return SPAM(
        groups,
        **_given(settings, *names, "compat"),
        state_dtype=facts.state_dtype,
        seed=facts.seed,
    )


def _stable_spam(settings: Any, groups: Groups, facts: RunFacts) -> ShardedOptimizer:
    names = ("lr", "betas", "eps", "gamma1", "gamma2", "gamma3", "eta", "update_gap", "compat")
    return StableSPAM(
        groups,
        **_given(settings, *names),
        total_T=facts.total_updates if settings.total_T is None else settings.total_T,
        state_dtype=facts.state_dtype,
    )


def _muon(settings: Any, groups: Groups, facts: RunFacts) -> ShardedOptimizer:
    groups = [
        {**g, "use_muon": g["name"] in ("targets", "factors")} for g in split_targets(groups, None)
    ]
    names = ("lr", "betas", "eps", "momentum", "adam_lr_ratio", "ns_method")
    return Muon(groups, **_given(settings, *names), state_dtype=facts.state_dtype)


def _projected(
    make: Callable[..., ShardedOptimizer], *names: str
) -> Callable[[Any, Any, Groups, RunFacts], ShardedOptimizer]:
    """A builder of a projected optimizer: ``names`` of the method are options of its targets."""

    def build(optimizer: Any, method: Any, groups: Groups, facts: RunFacts) -> ShardedOptimizer:
        options = _given(method, "rank", "update_proj_gap", "stagger", "basis", *names)
        groups = [
            {**g, **options} if g["name"] == "targets" else g
            for g in split_targets(groups, method.targets)
        ]
        extra = {"total_updates": facts.total_updates} if make is GoLore else {}
        return make(
            groups,
            **_given(optimizer, "lr", "betas"),
            eps=method.eps,
            state_dtype=facts.state_dtype,
            seed=facts.seed,
            **extra,
        )

    return build


def _loro(optimizer: Any, method: Any, groups: Groups, facts: RunFacts) -> ShardedOptimizer:
    return LORO(
        groups,
        **_given(optimizer, "lr", "betas"),
        **_given(method, "eps", "exact_every", "refresh_every", "refresh", "lr_scaler"),
        hidden_size=facts.hidden_size,
        state_dtype=facts.state_dtype,
    )


_APOLLO = ("scale", "scale_type", "scale_front", "proj", "proj_type", "limiter", "compat")
_METHODS: dict[str, Callable[[Any, Any, Groups, RunFacts], ShardedOptimizer]] = {
    "galore": _projected(GaLore, "scale", "proj_type", "limiter", "state_bits"),
    "fira": _projected(Fira, "scale", "proj_type", "limiter", "compat"),
    "apollo": _projected(Apollo, *_APOLLO),
    "apollo_mini": _projected(ApolloMini, *_APOLLO),
    "golore": _projected(GoLore, "rand_ratio", "kappa"),
    "loro": _loro,
}
_OPTIMIZERS: dict[str, Callable[[Any, Groups, RunFacts], ShardedOptimizer]] = {
    "spam": _spam,
    "stable_spam": _stable_spam,
    "muon": _muon,
}
