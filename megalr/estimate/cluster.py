"""A cluster's links and the time of collectives on them (latency plus bytes over bandwidth).

A group of ranks has ``k`` members in each of ``n`` nodes. Inside a node a collective is a ring; an
all-reduce over nodes is a reduce-scatter inside, an all-reduce of a k-th over the nodes (each GPU
through its own network card; ring or tree, whichever is faster), an all-gather inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalr.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        gpus_per_node: GPUs with fast links among them.
        memory: bytes of a GPU that a run can use.
        inside, across: bytes a second that one GPU sends inside a node, and to other nodes.
        inside_latency, across_latency: seconds of one message.
        file_system: bytes a second that the whole run can write to storage.
        writer: bytes a second that one process can write.
    """

    gpus_per_node: int
    memory: float
    inside: float
    across: float
    inside_latency: float
    across_latency: float
    file_system: float
    writer: float


H200 = Cluster(
    gpus_per_node=8,
    memory=0.92 * 140 * 2**30,
    inside=335e9,  # fitted to all-reduces on 4 H200: ALL_REDUCES in benchmarks/scaling/points.py
    across=42e9,  # a 400 Gbit/s card for each GPU, 85 % of its rate: assumed
    inside_latency=5e-6,  # fitted to the same
    across_latency=10e-6,  # assumed
    file_system=100e9,  # assumed
    writer=2e9,  # assumed
)
"""Nodes of eight H200 with NVLink."""


@dataclass(frozen=True)
class Members:
    """A group of ranks on a cluster: ``local`` in each of ``nodes`` nodes."""

    local: int
    nodes: int

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.local * self.nodes


def members(cluster: Cluster, size: int, stride: int = 1) -> Members:
    """The group of ``size`` ranks that are ``stride`` ranks apart.

    Raises:
        UserError: the group does not fill its nodes evenly.
    """
    in_node = max(1, cluster.gpus_per_node // stride)
    if size <= in_node:
        return Members(size, 1)
    if size % in_node:
        raise UserError(f"{size} ranks do not fill nodes of {in_node}: use a multiple")
    return Members(in_node, size // in_node)


def gather_seconds(size: float, group: Members, cluster: Cluster) -> float:
    """Seconds of an all-gather whose result has ``size`` bytes on every rank; equally those of a
    reduce-scatter of ``size`` bytes."""
    k, n = group.local, group.nodes
    inside = (k - 1) / k * size / cluster.inside + (k - 1) * cluster.inside_latency
    if n == 1:
        return inside
    # The rings of the k cards run beside each other, then the nodes share what came in.
    across = (n - 1) / n * size / k / cluster.across + math.log2(n) * cluster.across_latency
    return across + inside


def all_reduce_seconds(size: float, group: Members, cluster: Cluster) -> float:
    """Seconds of an all-reduce of ``size`` bytes."""
    inside = 2 * gather_seconds(size, Members(group.local, 1), cluster)
    n = group.nodes
    if n == 1:
        return inside
    part = size / group.local
    ring = 2 * (n - 1) / n * part / cluster.across + 2 * (n - 1) * cluster.across_latency
    tree = 2 * part / cluster.across + 2 * math.log2(n) * cluster.across_latency
    return inside + min(ring, tree)
