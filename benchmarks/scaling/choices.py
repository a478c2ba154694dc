"""The fastest way that fits to run a model on a number of GPUs, by the scaling model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalr.config.schema import ParallelConfig
from megalr.errors import UserError
from megalr.estimate.cluster import Cluster
from megalr.estimate.memory import GIB, estimate_memory
from megalr.estimate.tensors import plan_of
from megalr.estimate.update_time import Gpu, Job, UpdateTime, predict
from megalr.models.config import PRESETS
from megalr.tensor_parallel.plan import SINGLE
from scaling.besides import checkpoint_seconds, loading_seconds, refactorize_seconds
from scaling.points import METHODS, balancing, loader, method_of, run_config

MODELS = ("llama_1b", "llama_7b", "llama_13b")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCE, SEQUENCES = 2048, 2048
"""Positions and sequences of a global batch of the predictions: 4.2 M tokens."""


@dataclass(frozen=True)
class Choice:
    """The fastest way that fits, of one model and method on a number of GPUs."""

    preset: str
    method: str
    job: Job
    time: UpdateTime
    memory: float
    refactorize: float
    checkpoint: float
    loading: float

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.job.tokens / self.time.total / self.job.gpus


def candidates(preset: str, method: Any, gpus: int) -> Iterator[Job]:
    """Ways to run the global batch on ``gpus`` GPUs."""
    sizes = PRESETS[preset]
    layouts = ("column_row", "bottleneck") if method.name == "low_rank" else ("column_row",)
    cut = [plan_of(sizes, method, t, layout) for t in (2, 4, 8) for layout in layouts]
    for plan in (SINGLE, *cut):
        data_size = gpus // plan.mesh.tensor_size
        if data_size < 1 or SEQUENCES % data_size:
            continue
        share = SEQUENCES // data_size
        for micro in (m for m in (1, 2, 4, 8, 16, 32) if share % m == 0):
            for stage in (1, 2):
                for recompute in ("none", "full"):
                    yield Job(
                        sizes,
                        method,
                        micro,
                        SEQUENCE,
                        share // micro,
                        plan,
                        data_size,
                        stage,
                        recompute,
                        clipping=True,
                    )


def peak_of(preset: str, job: Job) -> float:
    """Bytes of a GPU."""
    method = job.method.model_dump()
    config = run_config(
        preset, method, job.micro_batch, SEQUENCES, SEQUENCE, activation_checkpointing=job.recompute
    )
    parallel = {"tensor": job.plan.mesh.tensor_size, "layout": job.plan.layout}
    config = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
    user = {"zero_optimization": {"stage": job.stage}}
    return estimate_memory(config, user, "scaling model", job.gpus).peak


def choose(preset: str, name: str, gpus: int, gpu: Gpu, cluster: Cluster) -> Choice:
    """The fastest candidate whose memory fits.

    Raises:
        UserError: none fits.
    """
    method = method_of(preset, name)
    jobs = sorted(
        ((predict(job, gpu, cluster), job) for job in candidates(preset, method, gpus)),
        key=lambda pair: pair[0].total,
    )
    for time, job in jobs:
        if (memory := peak_of(preset, job)) <= cluster.memory:
            return Choice(
                preset,
                name,
                job,
                time,
                memory,
                refactorize_seconds(job, cluster, balancing()),
                checkpoint_seconds(job, cluster),
                loading_seconds(job, loader()),
            )
    raise UserError(f"{preset} {name} does not fit {gpus} GPUs of {cluster.memory / GIB:.0f} GiB")


def sweep(gpu: Gpu, cluster: Cluster) -> list[Choice]:
    """The best way of every model and method on every number of GPUs."""
    return [
        choose(preset, name, gpus, gpu, cluster)
        for preset in MODELS
        for name in METHODS
        for gpus in GPUS
    ]
