"""Time of an update: products and traffic of the GPU, the update itself, communication.

    time = (flops / F + bytes / B) + overhead + communication that nothing hides

F and B are a GPU's effective arithmetic and memory speed. That the two add up is the efficiency
curve of a matrix product: F times share ``1 / (1 + F bytes / (B flops))``, low for small ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.estimate.cluster import Cluster, Members, all_reduce_seconds, gather_seconds, members
from megalr.estimate.states import group_sizes, wrapper_name
from megalr.estimate.tensors import count, different_blocks, stored_tensors
from megalr.estimate.traffic import Message, block_messages, data_traffic, end_messages
from megalr.estimate.work import Work, micro_batch_work, passes
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.plan import SINGLE, Plan

HIDDEN_SHARE = 0.8
"""Share of the backward pass behind which ZeRO 2 and 3 can hide communication."""


@dataclass(frozen=True)
class Gpu:
    """Effective speeds.

    Attributes:
        flops: operations a second of large matrix products (bf16).
        bandwidth: bytes a second.
        overhead: seconds of an update that neither explains: launches, waiting for the host.
    """

    flops: float
    bandwidth: float
    overhead: float

    def seconds(self, work: Work) -> float:
        """Time of this work."""
        return work.flops / self.flops + work.moved / self.bandwidth


SPEEDS = Gpu(flops=6.5e14, bandwidth=6.2e12, overhead=2.1e-3)
"""Of an H200, fitted to the recorded runs of one GPU (benchmarks/scaling/points.py; more than its
memory gives, since what stays in the cache is counted as moved)."""


@dataclass(frozen=True)
class Job:
    """One update of a run, AdamW, bf16 with float32 masters.

    Attributes:
        sizes, method: the model.
        plan: tensor parallelism.
        data_size: data-parallel ranks.
        stage: ZeRO stage.
        micro_batch, sequence, accumulation: sequences, positions, micro-batches of an update.
        recompute: level of activation checkpointing.
        clipping: whether gradients are clipped.
        compiled: whether blocks are compiled. If not, what lies between the products is counted
            twice: assumed.
    """

    sizes: DecoderConfig
    method: Any
    micro_batch: int
    sequence: int
    accumulation: int = 1
    plan: Plan = SINGLE
    data_size: int = 1
    stage: int = 1
    recompute: str = "none"
    clipping: bool = False
    compiled: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of an update over all ranks."""
        return self.micro_batch * self.sequence * self.accumulation * self.data_size

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.data_size * self.plan.mesh.tensor_size


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of an update: compute of the micro-batches, the optimizer's part, tensor-parallel
    and data-parallel communication, what is left of launching."""

    compute: float
    optimizer: float
    tensor: float
    data: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return self.compute + self.optimizer + self.tensor + self.data + self.overhead


def update_work(job: Job) -> tuple[Work, Work]:
    """Traffic of gradients and states: (in every micro-batch, once an update).

    Passes over memory that DeepSpeed's wrapper makes (docs/dev/deepspeed-notes.md):
    with BF16_Optimizer the gradients of the first micro-batch are copied to a float32 buffer and
    further ones added; the all-reduce of an update flattens that buffer, converts it and copies it
    back twice. One rank reduces nothing.
    """
    tensors = stored_tensors(job.sizes, job.method, job.plan)
    n = sum(group_sizes(tensors, job.sizes.num_layers, False).values())
    share = n / job.data_size
    adam, refresh = 28 * share, 6 * share
    if wrapper_name("bf16", job.stage, "fp32", False) == "BF16_Optimizer":
        reduced = 28 * n if job.data_size > 1 else 0
        once = reduced + 4 * n + (8 * share if job.clipping else 0) + adam + refresh + 4 * n
        return Work(moved=6 * n if job.accumulation == 1 else 12 * n), Work(moved=once)
    if job.stage == 0:
        once = 8 * n + 6 * n + 4 * n + (8 * n if job.clipping else 0) + 28 * n + 6 * n
        return Work(moved=6 * n if job.accumulation > 1 else 0), Work(moved=once)
    clip = 8 * share if job.clipping else 0
    return Work(moved=4 * n + 10 * share), Work(moved=4 * share + clip + adam + refresh)


def predict(job: Job, gpu: Gpu, cluster: Cluster) -> UpdateTime:
    """Time of one update.

    Raises:
        UserError: a layout that does not fit the model, groups that do not fill their nodes.
    """
    forward, backward = micro_batch_work(
        job.sizes, job.method, job.plan, job.micro_batch, job.sequence, recompute=job.recompute
    )
    if not job.compiled:
        tokens = job.micro_batch * job.sequence
        between = passes(job.sizes, job.plan, tokens, job.sequence, 2)
        forward += between[0] * job.sizes.num_layers
        backward += between[1] * job.sizes.num_layers
    every, once = update_work(job)
    compute = gpu.seconds(forward + backward)
    tensor = _tensor_seconds(job, cluster)
    data = _data_seconds(job, cluster, gpu.seconds(backward), compute)
    return UpdateTime(
        compute=job.accumulation * compute,
        optimizer=job.accumulation * gpu.seconds(every) + gpu.seconds(once),
        tensor=job.accumulation * tensor,
        data=data,
        overhead=gpu.overhead,
    )


def message_seconds(message: Message, tokens: int, group: Members, cluster: Cluster) -> float:
    """Time of one message of a tensor-parallel group."""
    collective = all_reduce_seconds if message.kind == "all_reduce" else gather_seconds
    return collective(message.size(tokens), group, cluster)


def _tensor_seconds(job: Job, cluster: Cluster) -> float:
    """Messages of one micro-batch; nothing hides them."""
    if job.plan.mesh.tensor_size == 1:
        return 0.0
    group = members(cluster, job.plan.mesh.tensor_size)
    tokens = job.micro_batch * job.sequence

    def seconds(messages: list[Message]) -> float:
        return sum(message_seconds(message, tokens, group, cluster) for message in messages)

    repeated = 2 if job.recompute == "full" else 1  # other levels never repeat sums
    blocks = 0.0
    for layer, times in different_blocks(job.sizes, job.method).items():
        forward, backward = block_messages(job.sizes, job.method, job.plan, layer=layer)
        blocks += times * (repeated * seconds(forward) + seconds(backward))
    first, last = end_messages(job.sizes, job.plan)
    return blocks + seconds(first) + seconds(last)


def _data_seconds(job: Job, cluster: Cluster, backward: float, compute: float) -> float:
    """Data-parallel communication of an update that no computation hides."""
    if job.data_size == 1:
        return 0.0
    tensors = stored_tensors(job.sizes, job.method, job.plan)
    trained = sum(group_sizes(tensors, job.sizes.num_layers, False).values())
    frozen = count(tensors, job.sizes.num_layers, "frozen")
    sent = data_traffic(job.stage, trained, frozen)
    group = members(cluster, job.data_size, job.plan.mesh.tensor_size)
    reduced = all_reduce_seconds(sent.reduced, group, cluster) if sent.reduced else 0.0
    fetched = gather_seconds(sent.fetched, group, cluster) if sent.fetched else 0.0
    scattered = gather_seconds(sent.scattered, group, cluster) if sent.scattered else 0.0
    open_ = max(0.0, reduced + scattered - HIDDEN_SHARE * backward)
    open_ += max(0.0, fetched - HIDDEN_SHARE * compute)
    once = all_reduce_seconds(sent.reduced_once, group, cluster) if sent.reduced_once else 0.0
    once += gather_seconds(sent.gathered_once, group, cluster) if sent.gathered_once else 0.0
    return job.accumulation * open_ + once
