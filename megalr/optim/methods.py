"""From the ``optimizer`` and ``method`` sections of a run to an optimizer over its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megalr.errors import UserError
from megalr.kernels.adamw import AdamW
from megalr.kernels.stochastic_rounding import StochasticRounding
from megalr.optim.galore import Apollo, ApolloMini, Fira, GaLore, GoLore
from megalr.optim.loro import LORO
from megalr.optim.matrix import MatrixOptimizer
from megalr.optim.muon import Muon, NorMuon
from megalr.optim.options import option_names
from megalr.optim.scale import SCALE
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.optim.spam import SPAM
from megalr.optim.spectron import Spectron
from megalr.optim.stable_spam import StableSPAM

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """Facts of the run that some update rules depend on.

    ``bf16_states``: moments in bf16 (``train.precision: paper_bf16``) instead of fp32.
    ``kernels``: whether AdamW may use a custom kernel (``train.kernels: auto``).
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
    """Move target matrices out of ``matrices`` (and ``sparse``) into a group ``targets`` before it.

    Target matrices are the parameters with ``row_blocks`` (embedding and head have none).
    ``targets`` are the last parts of their names; None means all. A parameter that stores several
    matrices must be a target as a whole.
    """
    result: Groups = []
    for group in groups:
        chosen = [
            p
            for p in group["params"]
            if group["name"] in ("matrices", "sparse") and _is_target(p, targets)
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
    if method.name in METHOD_RULES:
        if optimizer.name != "adamw":
            raise UserError(
                f"method.name={method.name} brings its own update rule: optimizer.name must be "
                f"adamw, got {optimizer.name}"
            )
        rule, section = METHOD_RULES[method.name], method
        options = {"lr": optimizer.lr, "betas": optimizer.betas}
    elif optimizer.name in OPTIMIZER_RULES:
        rule, section, options = OPTIMIZER_RULES[optimizer.name], optimizer, {}
    else:
        return None
    options |= {name: getattr(section, name) for name in option_names(type(section))}
    options.pop("weight_decay", None)  # the groups have it
    groups = _completed(rule, groups, options, section, facts)
    return rule(groups, **options, state_dtype=facts.state_dtype, seed=facts.seed)


def _completed(
    rule: type[ShardedOptimizer],
    groups: Groups,
    options: dict[str, Any],
    section: Any,
    facts: RunFacts,
) -> Groups:
    """The groups, marked for the rule; facts of the run are added to ``options``."""
    marks: dict[str, Any] = {}
    if issubclass(rule, MatrixOptimizer):
        groups = split_targets(groups, section.targets)
        marks["rank"] = options.pop("rank")
    elif rule is SPAM:
        groups = split_targets(groups, None)
        marks["density"] = options.pop("density")
    elif issubclass(rule, Muon):
        groups = split_targets(groups, None)
        marks["use_muon"] = True
    elif rule is SCALE:
        return _by_kind(groups)
    elif rule is Spectron:
        marks["use_spectron"] = True
    elif rule is LORO:  # the rank is that of the model's factors
        options.pop("rank")
        options["hidden_size"] = facts.hidden_size
    elif rule is StableSPAM and options["total_T"] is None:
        options["total_T"] = facts.total_updates
    if rule is GoLore:
        options["total_updates"] = facts.total_updates
    with_factors = issubclass(rule, Muon | Spectron)
    chosen = ("targets", "factors") if with_factors else ("targets",)
    return [{**g, **marks} if g["name"] in chosen else g for g in groups]


def _by_kind(groups: Groups) -> Groups:
    """The groups with the kinds of SCALE; a tied embedding is the head."""
    kinds = {"embedding": "embedding", "head": "head", "sparse": "vectors", "vectors": "vectors"}
    if not any(group["name"] == "head" for group in groups):
        kinds["embedding"] = "head"
    return [{**group, "kind": kinds.get(group["name"], "matrices")} for group in groups]


def kinds_apart(optimizer: Any) -> tuple[str, ...]:
    """Kinds of parameters that need groups of their own for the optimizer of a run."""
    rule = OPTIMIZER_RULES.get(optimizer.name)
    return () if rule is None else rule.apart


METHOD_RULES: dict[str, type[ShardedOptimizer]] = {
    "galore": GaLore,
    "fira": Fira,
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "golore": GoLore,
    "loro": LORO,
}
OPTIMIZER_RULES: dict[str, type[ShardedOptimizer]] = {
    "spam": SPAM,
    "stable_spam": StableSPAM,
    "muon": Muon,
    "normuon": NorMuon,
    "scale": SCALE,
    "spectron": Spectron,
}


def build_optimizer(
    settings: Any, method: Any, groups: Groups, facts: RunFacts
) -> torch.optim.Optimizer:
    """The optimizer over ``groups`` (see optim.groups).

    Plain ``adamw`` is torch's fused AdamW (decoupled decay, epsilon outside the bias correction),
    on CUDA and on the CPU (offload), with a custom kernel for bf16 states (see kernels.adamw);
    everything else is this package's (see :func:`make_optimizer`). The learning rate is 0 until the
    loop sets it before every update, so that nothing the engine does before the first one can
    change a weight.

    Raises:
        UserError: a method and an optimizer that do not go together, a rank beyond a matrix.
    """
    optimizer: torch.optim.Optimizer | None = make_optimizer(settings, method, groups, facts)
    if optimizer is None:
        options = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
        rounding = _rounding(settings.stochastic_rounding, facts.seed)
        if rounding is not None or (facts.bf16_states and facts.kernels):
            optimizer = AdamW(groups, **options, rounding=rounding, kernel=facts.kernels)
        else:
            optimizer = torch.optim.AdamW(groups, **options, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def _rounding(choice: str, seed: int) -> StochasticRounding | None:
    if choice == "none":
        return None
    return StochasticRounding(seed, choice in ("moments", "all"), choice in ("weights", "all"))
