"""One restart, whoever decided on it: a run inside an engine or a plain training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from megalr.config.restarts import RestartsConfig
from megalr.restarts.masters import Masters
from megalr.restarts.momentum_reset import reset_moments
from megalr.restarts.refactorize import factor_parameters, nonfinite_parameters, refactorize
from megalr.restarts.report import RestartReport, by_pattern
from megalr.restarts.rounds import FactorRounds
from megalr.restarts.transport import MomentTransport


def perform(
    report: RestartReport,
    config: RestartsConfig,
    state: Masters,
    work: FactorRounds | None,
    to_reset: Sequence[nn.Parameter] | None,
) -> RestartReport:
    """Refactorize the pairs of ``work``, then reset the moments of ``to_reset``; None: do not.

    Whether the moments of the factors are carried along is said by ``config``.

    Where a factor holds inf or nan nothing is done, and the report says so. Collective: every rank
    calls it with the same arguments. Returns ``report`` with what was done.
    """
    if work is not None:
        started = now(state.device)
        bad = nonfinite_parameters(state, factor_parameters(work.pairs))
        if bad:
            return replace(report, skipped_nonfinite=tuple(bad))
        moments = MomentTransport(work) if config.transports else None
        if moments is not None and not moments.updates:
            moments = None  # every update so far was skipped
        done = refactorize(work, moments)
        report = replace(
            report,
            refactorized=True,
            matrices=done.matrices,
            matrices_by_qr=done.by_qr,
            dead_directions=done.dead,
            reseeded_directions=done.reseeded,
            spectra=done.spectra,
            moments_transported=moments is not None,
            refactorize_seconds=now(state.device) - started,
        )
    if to_reset is not None:
        started = now(state.device)
        reset = reset_moments(state, to_reset, config.reset_moments, config.reset_counter)
        report = replace(
            report,
            reset=True,
            fraction_reset=reset.fraction,
            parameters_reset=by_pattern(reset.parameters),
            moments_reset=config.reset_moments,
            reset_seconds=now(state.device) - started,
        )
    return report


def now(device: torch.device) -> float:
    """Seconds of a clock, after what the device had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def has_moments(optimizer: torch.optim.Optimizer, kinds: Sequence[str]) -> bool:
    """Whether an optimizer keeps moments of one of these kinds, as far as its options say.

    The reset itself checks the rest, once there has been an update.
    """
    defaults = optimizer.defaults
    table = getattr(optimizer, "moment_names", {})
    has = {
        "first": "betas" in defaults or bool(defaults.get("momentum")),
        "second": "betas" in defaults or "alpha" in defaults,
    }
    return any(has[kind] or bool(table.get(kind)) for kind in kinds)
