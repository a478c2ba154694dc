"""Which plans of tensor parallelism a decoder can follow."""

from __future__ import annotations

from typing import Any

from megalr.errors import UserError
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.mesh import Mesh
from megalr.tensor_parallel.plan import Plan

BOTTLENECK_METHODS = ("low_rank", "cola")
"""Methods whose matrices are products of factors and nothing else."""

WIDE = 2048
"""Hidden size from which ``auto`` takes the bottleneck layout, the faster one there on 2 and on 4
ranks; column_row is for 1024 and less (docs/parallelism.md)."""

_TARGETS = {"q", "k", "v", "o", "gate", "up", "down"}


def make_plan(config: DecoderConfig, method: Any, mesh: Mesh, layout: str) -> Plan:
    """The plan for ``parallel.layout``; ``auto`` takes the faster one that the model allows.

    Raises:
        UserError: as :func:`check_plan`.
    """
    if layout == "auto":
        fits = mesh.tensor_size > 1 and config.hidden_size >= WIDE
        fits = fits and _why_not_bottleneck(config, method, mesh.tensor_size) is None
        layout = "bottleneck" if fits else "column_row"
    plan = Plan(mesh, layout)
    check_plan(config, method, plan)
    return plan


def check_plan(config: DecoderConfig, method: Any, plan: Plan) -> None:
    """Raise UserError, naming what would work, if the decoder cannot be cut as planned."""
    size = plan.mesh.tensor_size
    if size == 1:
        return
    fitting = [n for n in range(1, config.num_heads + 1) if not _misfit(config, n)]
    if misfit := _misfit(config, size):
        raise UserError(
            f"parallel.tensor {size} does not divide {misfit}: use one of "
            f"{', '.join(map(str, fitting))}"
        )
    if plan.layout == "bottleneck":
        reason = _why_not_bottleneck(config, method, size)
        if reason is not None:
            raise UserError(
                f"parallel.layout bottleneck {reason}: use parallel.layout=column_row or auto"
            )


def _misfit(config: DecoderConfig, size: int) -> str | None:
    """The first size of the model that ``size`` ranks cannot share equally; None if all fit."""
    sizes = {
        "model.num_heads": config.num_heads,
        "model.num_kv_heads": config.kv_heads,
        "the padded MLP width": config.padded_intermediate_size,
        "the padded vocabulary": config.padded_vocab_size,
    }
    for name, value in sizes.items():
        if value % size:
            pad = f" (set by model.pad_multiple {config.pad_multiple})" if "padded" in name else ""
            return f"{name} {value}{pad}"
    return None


def _why_not_bottleneck(config: DecoderConfig, method: Any, size: int) -> str | None:
    """What stands against layout bottleneck; None if nothing does."""
    if method.name not in BOTTLENECK_METHODS:
        names = " and ".join(BOTTLENECK_METHODS)
        return f"needs matrices that are products of factors ({names}), not {method.name}"
    wanted = _TARGETS if config.gated_mlp else _TARGETS - {"gate"}
    missing = sorted(wanted - set(method.targets))
    if missing:
        return f"needs every matrix factorized, but method.targets lacks {', '.join(missing)}"
    if config.norm != "rms" or config.positions != "rope":
        return "needs RMSNorm and rotary positions"
    if config.hidden_size % size:
        return f"needs a hidden size that {size} divides, not {config.hidden_size}"
    return None
