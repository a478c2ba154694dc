"""Rendezvous of all ranks before the first collective, with errors that name the failing rank.

The exchange uses torch's key-value store at MASTER_ADDR:MASTER_PORT and so requires only that
every rank reaches that address. A rank without a GPU, or one that never arrives, is reported by
number and host on all ranks, which would otherwise block in a collective.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from megalr.distributed.launcher_env import host_name
from megalr.errors import AgreedError, UserError

RENDEZVOUS_SECONDS = 600.0
"""Upper limit of the rendezvous: the first start on a cluster reads gigabytes of libraries from a
shared file system."""

_EVERYONE = "everyone"
_READERS = "readers"
_DELIVERY_SECONDS = 5.0
_GRACE_SECONDS = 10.0  # how much longer the others wait for rank 0 than rank 0 for them


@dataclass(frozen=True)
class RankInfo:
    """A rank's entry in the rendezvous.

    Attributes:
        host: name of its machine.
        address: its own address on the route to MASTER_ADDR.
        error: why it cannot take part; None if it can.
        gpu: identifies its GPU on the machine; "" on the CPU.
    """

    host: str
    address: str
    error: str | None
    gpu: str = ""


def rendezvous(error: UserError | None, timeout_seconds: float, gpu: str = "") -> dist.Store:
    """Wait until every rank of the world has arrived. Collective.

    If ranks are on several machines and GLOO_SOCKET_IFNAME is not set, set it to the interface on
    the route to MASTER_ADDR: gloo's default is the interface of the host's name, which many
    systems map to the loopback.

    Args:
        error: why this rank cannot take part, if it cannot.
        timeout_seconds: how long to wait for the last rank, at most RENDEZVOUS_SECONDS.
        gpu: identifies this rank's GPU on its machine; "" on the CPU.

    Returns:
        The store; keep it until torch serves its own at this address.

    Raises:
        UserError: the port is taken, or MASTER_ADDR cannot be reached.
        AgreedError: a rank has not arrived or has failed, or two ranks have the same GPU; names
            number and host.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = min(timeout_seconds, RENDEZVOUS_SECONDS)
    server = _open_store(rank, world_size, seconds)
    # When torchrun restarts its processes they use the same store.
    store = dist.PrefixStore(f"megalr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    address = _address_towards(os.environ["MASTER_ADDR"])
    here = RankInfo(host_name(), address, _text(error), gpu)
    store.set(str(rank), json.dumps(asdict(here)))
    everyone = _gather(store, world_size, seconds) if rank == 0 else _receive(store, seconds)
    problem = find_problem(everyone)
    if problem is not None:
        if rank == 0:
            _wait_for_readers(store, world_size - 1)
        raise AgreedError(problem)
    _choose_interface(here.address, [other.address for other in everyone])
    return server


def find_problem(everyone: list[RankInfo]) -> str | None:
    """The first error of a rank, or the first two ranks with the same GPU; None without."""
    for rank, info in enumerate(everyone):
        if info.error is not None:
            return f"rank {rank} on {info.host}: {info.error}"
    users: dict[tuple[str, str], int] = {}
    for rank, info in enumerate(everyone):
        first = users.setdefault((info.host, info.gpu), rank) if info.gpu else rank
        if first != rank:
            return (
                f"ranks {first} and {rank} on {info.host} have the same GPU ({info.gpu}): start as "
                "many processes on a machine as it has GPUs, and show each its own GPU or all of "
                "them (CUDA_VISIBLE_DEVICES, --gpus-per-task)"
            )
    return None


def _open_store(rank: int, world_size: int, seconds: float) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
    try:
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not agents,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=not agents,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT {port} is in use on {host_name()}: another job or a leftover process "
                "has it; start with another one (--master_port of deepspeed and torchrun, "
                "MASTER_PORT for srun and mpirun)"
            ) from None
        raise UserError(
            f"rank {rank} on {host_name()} cannot reach {address}:{port} (MASTER_ADDR:MASTER_PORT) "
            f"within {seconds:g} s: check that rank 0 runs there, that the name resolves to an "
            "address of the cluster's network, and that no firewall closes the port"
        ) from error


def _gather(store: dist.Store, world_size: int, seconds: float) -> list[RankInfo]:
    """Rank 0: gather the entries of all ranks and publish them, or the error naming the missing."""
    deadline = time.monotonic() + seconds
    missing = list(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([str(rank)])]
        if missing:
            time.sleep(0.1)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        text = (
            f"rank {shown} of {world_size} did not arrive at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {seconds:g} s: look at its own log, and check "
            "that every node was started and reaches this address"
        )
        store.set(_EVERYONE, json.dumps({"missing": text}))
        _wait_for_readers(store, world_size - 1 - len(missing))
        raise AgreedError(text)
    entries = [json.loads(store.get(str(rank))) for rank in range(world_size)]
    store.set(_EVERYONE, json.dumps({"ranks": entries}))
    return [RankInfo(**entry) for entry in entries]


def _receive(store: dist.Store, seconds: float) -> list[RankInfo]:
    """Other ranks: the entries that rank 0 published."""
    try:
        store.wait([_EVERYONE], timedelta(seconds=seconds + _GRACE_SECONDS))
        answer = json.loads(store.get(_EVERYONE))
        store.add(_READERS, 1)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"{host_name()}: rank 0 did not answer at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {seconds:g} s: look at its own log, and check "
            "that no other program uses the port"
        ) from error
    if "missing" in answer:
        raise AgreedError(answer["missing"])
    return [RankInfo(**entry) for entry in answer["ranks"]]


def _wait_for_readers(store: dist.Store, count: int) -> None:
    """Rank 0, before it exits and the store with it: wait until the others have read the error."""
    deadline = time.monotonic() + _DELIVERY_SECONDS
    while store.add(_READERS, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def _address_towards(target: str) -> str:
    """This machine's address on the route to ``target`` (name or address); sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _choose_interface(own: str, addresses: list[str]) -> None:
    """Set GLOO_SOCKET_IFNAME if ranks are on several machines and it is not set."""
    if len(set(addresses)) == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if ipaddress.ip_address(own).is_loopback:  # rank 0's host name resolves to the loopback
        outside = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
        own = _address_towards(outside[0])
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _text(error: UserError | None) -> str | None:
    return None if error is None else str(error)
