"""What a run does besides updates: refactorization, checkpoints, data. Seconds of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megalr.estimate.cluster import Cluster, gather_seconds, members
from megalr.estimate.tensors import TRAINED, count, matrix_groups, stored_tensors
from megalr.estimate.update_time import Job
from megalr.restarts.rounds import bucket_of


@dataclass(frozen=True)
class Balancing:
    """Measured seconds of balancing one matrix's factors: alone, and as one of many."""

    rank: int
    alone: float
    among_many: float


def balancing_at(rank: int, measured: Sequence[Balancing]) -> Balancing:
    """Interpolated between measured ranks, extrapolated beyond: powers of the rank."""
    points = sorted(measured, key=lambda point: point.rank)
    upper = next((i for i, p in enumerate(points) if p.rank >= rank), len(points) - 1)
    low, high = points[max(0, upper - 1)], points[max(1, upper)]
    place = math.log(rank / low.rank) / math.log(high.rank / low.rank)

    def between(a: float, b: float) -> float:
        return a * (b / a) ** place

    return Balancing(rank, between(low.alone, high.alone), between(low.among_many, high.among_many))


def refactorize_seconds(job: Job, cluster: Cluster, measured: Sequence[Balancing]) -> float:
    """One refactorization of all factors; 0 for a model without.

    The matrices are shared out over the data-parallel ranks, which work in rounds of a bounded
    number of bytes. Factors travel to their owners and back in float32, new weights in bf16.
    """
    layers = job.sizes.num_layers
    shapes = [
        (rows, group.n)
        for group in matrix_groups(job.sizes, job.method, job.plan)
        if group.factorized and job.method.name != "cola"
        for rows in group.rows
    ]
    if not shapes:
        return 0.0
    elements = layers * sum((m + n) * job.method.rank for m, n in shapes)
    own = math.ceil(layers * len(shapes) / job.data_size)
    a_round = own
    if job.data_size > 1:
        mean = 4 * elements / (layers * len(shapes))
        a_round = min(own, max(1, int(bucket_of(4 * elements) / mean)))
    cost = balancing_at(job.method.rank, measured)
    rounds = math.ceil(own / a_round)
    balance = rounds * cost.alone + (own - rounds) * cost.among_many
    if job.data_size == 1:
        return balance
    group = members(cluster, job.data_size, job.plan.mesh.tensor_size)
    share = 4 * elements / job.plan.mesh.tensor_size / job.data_size
    link = cluster.inside if group.nodes == 1 else cluster.across
    latency = cluster.inside_latency if group.nodes == 1 else cluster.across_latency
    moved = 2 * share / link + 2 * rounds * (job.data_size - 1) * latency
    tensors = stored_tensors(job.sizes, job.method, job.plan)
    return balance + moved + gather_seconds(2 * count(tensors, layers, *TRAINED), group, cluster)


def checkpoint_seconds(job: Job, cluster: Cluster) -> float:
    """Writing weights (bf16, by the first data-parallel rank) and float32 masters and moments (by
    every rank its share)."""
    tensors = stored_tensors(job.sizes, job.method, job.plan)
    trained = count(tensors, job.sizes.num_layers, *TRAINED)
    frozen = count(tensors, job.sizes.num_layers, "frozen")
    weights = 2 * (trained + frozen)
    whole = max(weights / cluster.writer, weights * job.plan.mesh.tensor_size / cluster.file_system)
    states = 12 * trained * job.plan.mesh.tensor_size
    return whole + max(states / job.gpus / cluster.writer, states / cluster.file_system)


@dataclass(frozen=True)
class Loader:
    """Measured speeds of the loader of one rank: sequences a second whose place in the global order
    is found, tokens a second that are read."""

    ordered: float
    read: float


def loading_seconds(job: Job, loader: Loader) -> float:
    """Seconds that a rank's loader works for one update, in its own thread.

    Every rank orders the whole global batch and reads its share. Only what exceeds the time of the
    update is waited for.
    """
    sequences = job.micro_batch * job.accumulation * job.data_size
    return sequences / loader.ordered + sequences * job.sequence / job.data_size / loader.read
