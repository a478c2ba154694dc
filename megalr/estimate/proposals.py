"""Ways to run that fit the memory of a GPU, in the order of their expected speed.

Searched: tensor-parallel ranks (the divisors of a host's GPUs that cut the model), ZeRO stage,
level of activation checkpointing, micro-batch (the divisors of a rank's share of the global batch).
Of each pair of tensor-parallel ranks and ZeRO stage the fastest way that fits is proposed. Speed is
that of the scaling model (estimate.update_time) on H200 with NVLink; it knows AdamW in bf16. A GPU
must have room for the peak, its error bound and what is outside of PyTorch
(:attr:`MemoryEstimate.needed`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalr.config.methods import ReloraMethod
from megalr.config.schema import RunConfig
from megalr.engine.build import check_run
from megalr.errors import UserError
from megalr.estimate.activations import TWO_PRODUCTS
from megalr.estimate.cluster import H200
from megalr.estimate.memory import GIB, MemoryEstimate, data_parallel_size, estimate_memory
from megalr.estimate.tensors import DENSE_INSIDE, plan_of
from megalr.estimate.update_time import SPEEDS, Job, predict
from megalr.models.build import sizes_of
from megalr.models.recompute import FOR_FACTORS, LEVELS

STAGES = (0, 1, 2, 3)
DEFAULT_STAGE = 1
"""Of a run without a DeepSpeed JSON."""

SLOWER_AT_3 = 2.0
"""Factor of the predicted time at ZeRO 3: 1B low_rank on two H200s, compiled, 240,251 tokens/s at
ZeRO 2 and 122,032 at ZeRO 3 (benchmarks/lab/parallelism.md), before engine.patch_zero3."""

_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(GiB|GB)?", re.IGNORECASE)


@dataclass(frozen=True)
class Proposal:
    """A way to run that fits.

    Attributes:
        config: of the run.
        stage: of ZeRO.
        estimate: its memory.
        seconds: of an update, predicted.
        words: what to type behind the command line that it was proposed for.
    """

    config: RunConfig
    stage: int
    estimate: MemoryEstimate
    seconds: float
    words: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, predicted."""
        tokens = self.config.train.global_batch_size * self.config.data.sequence_length
        return tokens / self.seconds


def memory_size(text: str) -> int:
    """Bytes of ``24GiB``, ``24GB`` or ``24`` (GiB).

    Raises:
        UserError: anything else, or nothing.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        unit = 10**9 if (found[2] or "").lower() == "gb" else GIB
        size = int(float(found[1]) * unit)
    if size <= 0:
        raise UserError(f"--fit {text}: must be the memory of a GPU: 24GiB, 24GB, or 24 for GiB")
    return size


def proposals(config: RunConfig, room: int, gpus: int, tensor: int | None = None) -> list[Proposal]:
    """The fastest way to run with each number of tensor-parallel ranks and each ZeRO stage.

    Args:
        config: the run; the sizes of a pretrained model must have been filled in.
        room: bytes of a GPU.
        gpus: ranks of the run.
        tensor: tensor-parallel ranks; None: all that cut the model are tried.

    Raises:
        UserError: nothing fits, ``tensor`` does not divide ``gpus``, or the global batch cannot be
            shared out.
    """
    data_parallel_size(gpus, 1 if tensor is None else tensor)
    found: list[Proposal] = []
    least: Proposal | None = None
    for ranks in [tensor] if tensor is not None else _divisors(_per_host(gpus)):
        for stage in STAGES:
            ways = list(_ways(config, gpus, ranks, stage))
            fitting = [way for way in ways if way.estimate.needed <= room]
            for way in sorted(fitting, key=lambda way: way.seconds):
                if _runs(way, gpus):
                    found.append(way)
                    break
            smallest = min(ways, key=lambda way: way.estimate.needed, default=None)
            if not fitting and smallest is not None and _runs(smallest, gpus):
                pair = [smallest] if least is None else [smallest, least]
                least = min(pair, key=lambda way: way.estimate.needed)
    if found:
        return sorted(found, key=lambda way: way.seconds)
    if least is None:
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} on {gpus} GPUs: there is no "
            "way to share it out that this model, method and optimizer allow: use a multiple of "
            "the number of GPUs"
        )
    raise UserError(_nothing_fits(least, room))


def _per_host(gpus: int) -> int:
    """GPUs of a host: all up to eight, else as many as divide eight."""
    return gpus if gpus <= H200.gpus_per_node else math.gcd(gpus, H200.gpus_per_node)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _levels(config: RunConfig) -> list[str]:
    """Levels of activation checkpointing that the method allows."""
    method = config.method.name
    wrong = [] if method in TWO_PRODUCTS else list(FOR_FACTORS)
    wrong += ["elementwise"] if method in DENSE_INSIDE else []
    return [level for level in LEVELS if level not in wrong]


def _ways(config: RunConfig, gpus: int, tensor: int, stage: int) -> Iterator[Proposal]:
    """Every micro-batch and level, whether it fits or not; none if the ranks do not go together."""
    if gpus % tensor or config.train.global_batch_size % (gpus // tensor):
        return
    if stage == 3 and (tensor > 1 or isinstance(config.method, ReloraMethod)):
        return
    try:
        plan_of(sizes_of(config), config.method, tensor, config.parallel.layout)
    except UserError:
        return
    share = config.train.global_batch_size // (gpus // tensor)
    for level in _levels(config):
        for micro in _divisors(share):
            yield _way(config, gpus, stage, _changes(config, stage, tensor, micro, level))


def _changes(
    config: RunConfig, stage: int, tensor: int, micro: int, level: str
) -> dict[str, dict[str, Any]]:
    """Values by section and key."""
    train: dict[str, Any] = {"micro_batch_size": micro, "activation_checkpointing": level}
    train["gradient_accumulation"] = None
    if stage == 3:
        train["cuda_graphs"] = False
    return {"train": train, "parallel": {"tensor": tensor}}


def _way(config: RunConfig, gpus: int, stage: int, changes: dict[str, dict[str, Any]]) -> Proposal:
    sections = {
        name: getattr(config, name).model_copy(update=values) for name, values in changes.items()
    }
    words = tuple(
        f"{name}.{key}={_yaml(value)}"
        for name, values in changes.items()
        for key, value in values.items()
        if getattr(getattr(config, name), key) != value
    )
    if stage != DEFAULT_STAGE:
        words += (f"--deepspeed_config=zero{stage}",)
    changed = config.model_copy(update=sections)
    user = {"zero_optimization": {"stage": stage}}
    estimate = estimate_memory(changed, user, f"ZeRO {stage}", gpus)
    return Proposal(changed, stage, estimate, _seconds(changed, gpus, stage), words)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _seconds(config: RunConfig, gpus: int, stage: int) -> float:
    """Of an update, by the scaling model."""
    train, sizes, tensor = config.train, sizes_of(config), config.parallel.tensor
    copies = gpus // tensor
    job = Job(
        sizes,
        config.method,
        train.micro_batch_size,
        config.data.sequence_length,
        accumulation=train.global_batch_size // (train.micro_batch_size * copies),
        plan=plan_of(sizes, config.method, tensor, config.parallel.layout),
        data_size=copies,
        stage=stage,
        recompute=train.activation_checkpointing,
        clipping=bool(train.gradient_clipping),
        compiled=train.compile,
    )
    time = predict(job, SPEEDS, replace(H200, gpus_per_node=_per_host(gpus))).total
    return time * (SLOWER_AT_3 if stage == 3 else 1)


def _runs(way: Proposal, gpus: int) -> bool:
    """Whether the model and the engine accept it."""
    try:
        check_run(way.config, way.stage, gpus // way.config.parallel.tensor)
    except UserError:
        return False
    return True


def _nothing_fits(least: Proposal, room: int) -> str:
    """What the smallest way needs, and what would make it smaller."""
    s, parts = least.estimate.states, least.estimate.peak_parts()[1]
    states = sum(size for name, size in parts.items() if name in ("weights", "master weights"))
    states += s.frozen + s.gradients + s.moments
    helps = "a smaller data.sequence_length keeps less"
    if states > least.estimate.peak / 2:
        fewer = "a smaller method.rank" if hasattr(least.config.method, "rank") else "low_rank"
        helps = f"more GPUs share the states out, {fewer} has fewer, zero2_offload moves them"
    return (
        f"nothing fits {room / GIB:.1f} GiB: the smallest run needs "
        f"{least.estimate.needed / GIB:.1f} (ZeRO {least.stage}, "
        f"parallel.tensor={least.config.parallel.tensor}, "
        f"train.micro_batch_size={least.config.train.micro_batch_size}, "
        "train.activation_checkpointing="
        f"{least.config.train.activation_checkpointing}): {helps}"
    )
