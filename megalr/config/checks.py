"""Rules that concern several keys of the configuration at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os.path import abspath
from typing import Any

from megalr.config.base import split_fork
from megalr.config.optimizers import ADAMW_EPS
from megalr.config.projected import ALL_PROJECTIONS, PROJECTED_NAMES


def cross_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong with it) for every rule that is broken.

    ``value_of`` maps a dotted key to its value, or to None where there is no valid one (absent, or
    already reported as wrong); a rule with a missing value is not checked.
    """
    yield from _batch_problems(value_of)
    yield from _method_problems(value_of)
    yield from _transfer_problems(value_of)
    yield from _fork_problems(value_of)
    yield from _rounding_problems(value_of)
    yield from _spectron_problems(value_of)
    warmup, updates = value_of("schedule.warmup_updates"), value_of("train.updates")
    if warmup is not None and updates is not None and warmup > updates:
        yield (
            "schedule.warmup_updates",
            f"more warm-up updates than the run has (train.updates = {updates}); "
            "lower the one or raise the other",
        )
    yield from _decay_problems(value_of, warmup, updates)
    yield from _cycle_problems(value_of, warmup, updates)
    if value_of("checkpoint.keep_best") and value_of("evaluation.every") == 0:
        yield (
            "checkpoint.keep_best",
            "the best checkpoint is found by evaluations at its update, and evaluation.every is 0; "
            "evaluate at a period of which checkpoint.every is a multiple",
        )
    if value_of("data.document_mask") and value_of("data.packing") is False:
        yield (
            "data.document_mask",
            "needs packing, and data.packing is false, where each sample is one document already; "
            "leave one of the two out",
        )
    if value_of("health.spike_action") == "skip" and value_of("train.cuda_graphs"):
        yield (
            "health.spike_action",
            "skip looks at the loss before the backward pass, which is one CUDA graph with the "
            "forward pass: switch train.cuda_graphs off, or take another action",
        )


def _fork_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """A fork needs a folder of its own."""
    source, folder = value_of("run.fork_from"), value_of("run.dir")
    if source and folder and abspath(split_fork(source)[0]) == abspath(folder):
        yield (
            "run.fork_from",
            "is run.dir itself, which a fork never writes to: choose another run.dir",
        )


def _decay_problems(
    value_of: Callable[[str], Any], warmup: int | None, updates: int | None
) -> Iterator[tuple[str, str]]:
    """The decay of schedule wsd against the run's length and the warm-up."""
    decay = value_of("schedule.decay_updates")
    if decay is None or updates is None or value_of("schedule.name") != "wsd":
        return
    if (warmup or 0) <= updates < (warmup or 0) + decay:
        yield (
            "schedule.decay_updates",
            f"with warmup_updates {warmup or 0} more than the run has (train.updates = {updates}); "
            "lower one of the two or raise train.updates",
        )


def _cycle_problems(
    value_of: Callable[[str], Any], warmup: int | None, updates: int | None
) -> Iterator[tuple[str, str]]:
    """The cycles of schedule cosine_restarts against the run's length and the warm-up."""
    cycle = value_of("schedule.cycle_updates")
    if cycle is None or value_of("schedule.name") != "cosine_restarts":
        return
    if updates is not None and updates % cycle:
        yield (
            "schedule.cycle_updates",
            f"must divide train.updates {updates}; the nearest run: "
            f"{max(1, round(updates / cycle)) * cycle} updates",
        )
    first = (warmup or 0) + (value_of("schedule.adjust_updates") or 0)
    if first > cycle:
        yield (
            "schedule.cycle_updates",
            f"must be at least warmup_updates + adjust_updates = {first}",
        )


def _rounding_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Stochastic rounding needs AdamW with bfloat16 weights and states."""
    if value_of("optimizer.stochastic_rounding") in (None, "none"):
        return
    precision, method = value_of("train.precision"), value_of("method.name")
    if precision not in (None, "paper_bf16"):
        yield (
            "optimizer.stochastic_rounding",
            f"train.precision {precision} keeps weights and optimizer state in float32, where "
            "there is nothing to round: use none, or train.precision=paper_bf16",
        )
    if method in PROJECTED_NAMES:
        yield (
            "optimizer.stochastic_rounding",
            f"method {method} brings its own update rule, which rounds to nearest: use none",
        )


def _method_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Methods against the optimizer section and against pretrained weights."""
    method, optimizer = value_of("method.name"), value_of("optimizer.name")
    if method == "cola" and value_of("model.from_pretrained") is not None:
        yield (
            "model.from_pretrained",
            "method cola has a nonlinearity between its factors and cannot take the weights of a "
            "matrix: use another method, or a preset",
        )
    if optimizer == "scale" and value_of("restarts.reset_scope") == "factors":
        yield (
            "restarts.reset_scope",
            "factors have no moments with optimizer scale, which keeps those of head and norms "
            "only: use all",
        )
    if method not in PROJECTED_NAMES:
        return
    if optimizer not in (None, "adamw"):
        yield (
            "optimizer.name",
            f"method {method} brings its own update rule: keep adamw, whose learning rate, betas "
            "and weight decay it uses",
        )
    elif value_of("optimizer.eps") not in (None, ADAMW_EPS):
        yield "optimizer.eps", f"not used by method {method}: set method.eps instead"


def _spectron_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Spectron bounds the change of a product of two factors."""
    method = value_of("method.name")
    if value_of("optimizer.name") != "spectron" or method is None or method in PROJECTED_NAMES:
        return
    rank, alpha = value_of("method.rank"), value_of("method.alpha")
    if method != "low_rank":
        yield (
            "optimizer.name",
            f"spectron trains pairs of factors whose product is the weight: method {method} has "
            "other matrices, use low_rank",
        )
    elif None not in (rank, alpha) and alpha != rank:
        yield (
            "method.alpha",
            f"spectron bounds the change of W = B A, and alpha / rank = {alpha:g} / {rank} scales "
            f"it: set method.alpha={rank}",
        )
    elif value_of("method.ranks"):
        yield (
            "method.ranks",
            "spectron bounds the change of W = B A, and alpha / rank is 1 for one rank only: use "
            "one rank, or another optimizer",
        )


def _transfer_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """What ``method.lr_transfer`` has a rule for."""
    if value_of("method.lr_transfer") is None:
        return
    needed = {
        "optimizer.name": ("adamw", "the rule is that of Adam's updates"),
        "method.init": ("kaiming", "the rule is for that draw of the factors"),
        "method.dlr_alpha": ("null", "the rule does not cover a fixed offset of B"),
        "model.from_pretrained": ("null", "the rule is for weights that are drawn"),
    }
    for key, (wanted, reason) in needed.items():
        value = value_of(key)
        if value not in (None, wanted):
            yield "method.lr_transfer", f"{reason}, but {key} is {value}: use {key}={wanted}"
    targets = value_of("method.targets")
    missing = [name for name in ALL_PROJECTIONS if targets is not None and name not in targets]
    if missing:
        yield (
            "method.lr_transfer",
            f"there is no rule for matrices stored whole, and method.targets lacks "
            f"{', '.join(missing)}: use all targets",
        )


def _batch_problems(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    total = value_of("train.global_batch_size")
    micro = value_of("train.micro_batch_size")
    if total is None or micro is None:
        return
    accumulation = value_of("train.gradient_accumulation") or 1
    if total % (micro * accumulation):
        product = f"micro_batch_size {micro}"
        if accumulation > 1:
            product += f" x gradient_accumulation {accumulation} = {micro * accumulation}"
        step = micro * accumulation
        lower, upper = total // step * step, (total // step + 1) * step
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        yield (
            "train.global_batch_size",
            f"must be a multiple of {product}; the nearest multiples: {nearest}",
        )
