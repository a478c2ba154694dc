"""Software and hardware of a run: report at the head of the log, equality across ranks."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.distributed.agreement import raise_on_any_rank
from megalr.distributed.launcher_env import host_name
from megalr.errors import UserError
from megalr.version import __version__

_SHOWN_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "UCX_", "DS_ACCELERATOR", "OMP_NUM")
PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of megalr's source."""
_INFINIBAND = Path("/sys/class/infiniband")
PEAK_BF16_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 tensor-core peak by exact device name, from the vendor's datasheets. A device that is
not here has no MFU rather than a guessed one."""


def versions(device: torch.device) -> dict[str, str]:
    """Versions of everything the results depend on, and the device's name."""
    nccl = "none"
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "megalr": __version__,
        "source": source_hash()[:12],
        "commit": commit(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "nccl": nccl,
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device for the run's precision, None when it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


def source_hash() -> str:
    """SHA-256 of the package's Python files with their names: equal only for equal code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def commit() -> str:
    """The git commit of the source folder, with ``+changes`` if files differ from it; or none."""
    if not (PACKAGE.parent / ".git").exists():
        return "none"
    try:
        number = _git(PACKAGE, "rev-parse", "--short=12", "HEAD")
        changed = _git(PACKAGE, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "none"  # git is not installed, or the repository belongs to another user
    return number + ("+changes" if changed else "")


def report(device: torch.device) -> str:
    """The lines that open a run's log. Collective; meant to be printed by rank 0.

    Versions, hosts with their ranks and devices, network interfaces and fabric of rank 0's host,
    and the environment variables that configure communication.
    """
    own = (host_name(), device_name(device))
    everyone = [own] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(everyone, own)
    software = versions(device)
    del software["device"]
    hosts = list(dict.fromkeys(host for host, _ in everyone))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    connection = [
        "one process" if dist.get_world_size() == 1 else f"meeting at {address}",
        f"backend {dist.get_backend()}",
    ]
    if "SLURM_JOB_ID" in os.environ:
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        connection.append(f"SLURM job {os.environ['SLURM_JOB_ID']} (requeued {restarts} times)")
    variables = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN_PREFIXES)
    ]
    lines = [
        "  ".join(f"{name} {value}" for name, value in software.items()),
        f"ranks {len(everyone)} on {len(hosts)} hosts: "
        + "; ".join(_host_line(host, everyone) for host in hosts),
        ", ".join(connection),
        "network: " + "; ".join(_interfaces() + _fabric()),
        "variables: " + (" ".join(variables) or "none"),
    ]
    return "\n".join(f"[environment] {line}" for line in lines)


def slow_precision(device: torch.device, precision: str) -> str | None:
    """One line if the run would be slow for its precision alone; None otherwise.

    Most processors have no bf16 arithmetic; a 9M model took 40 to 61 s for an update of 128 x 256
    tokens in bf16, 3.4 s in float32, on two cores.
    """
    if device.type != "cpu" or precision == "fp32":
        return None
    return (
        f"warning: train.precision is {precision}; on a CPU it may take ten times as long as "
        "float32: set train.precision=fp32"
    )


def check_ranks_agree(config: RunConfig, ds_config: dict[str, Any], fingerprint: str) -> None:
    """Refuse to start unless all ranks have rank 0's code, configuration and data. Collective.

    Args:
        config: this rank's run.
        ds_config: this rank's resolved DeepSpeed configuration.
        fingerprint: that of this rank's training data.

    Raises:
        AgreedError: names the first rank that differs, its host, the keys and both values.
    """
    own = {
        "host": host_name(),
        "code": {
            "megalr": f"{__version__} with source {source_hash()[:12]}",
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "python": platform.python_version(),
        },
        "config": config.model_dump(mode="json"),
        "deepspeed_config": ds_config,
        "data": {"fingerprint of data.train": fingerprint[:12]},
    }
    main = [own]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(main, src=0)
    raise_on_any_rank(_difference(main[0], own))


def _difference(main: dict[str, Any], own: dict[str, Any]) -> UserError | None:
    remedies = {
        "code": "install the same code and environment on every node, or put both on a file system "
        "that all of them share",
        "config": "give every rank the same files and command line",
        "deepspeed_config": "give every rank the same --deepspeed_config",
        "data": "copy the data to every node again, or use a file system that all of them share",
    }
    for section, remedy in remedies.items():
        found = list(_differing(main[section], own[section]))
        if found:
            listed = "; ".join(f"{key} {ours} here, {theirs} there" for key, theirs, ours in found)
            return UserError(f"differs from rank 0 on {main['host']}: {listed}; {remedy}")
    return None


def _differing(main: dict[str, Any], own: dict[str, Any]) -> Sequence[tuple[str, Any, Any]]:
    """(dotted key, rank 0's value, this rank's value) of every difference."""
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*main, *own]):
        theirs, ours = main.get(key, "(not set)"), own.get(key, "(not set)")
        if isinstance(theirs, dict) and isinstance(ours, dict):
            found += [(f"{key}.{name}", a, b) for name, a, b in _differing(theirs, ours)]
        elif theirs != ours:
            found.append((key, theirs, ours))
    return found


def _host_line(host: str, everyone: Sequence[tuple[str, str]]) -> str:
    ranks = [rank for rank, (name, _) in enumerate(everyone) if name == host]
    devices = [everyone[rank][1] for rank in ranks]
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    shown = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    return f"{host} (ranks {shown}: {kinds})"


def _interfaces() -> list[str]:
    """Name and IPv4 address of every network interface of this host except the loopback."""
    return [
        f"{name} {entry.address}"
        for name, entries in sorted(psutil.net_if_addrs().items())
        for entry in entries
        if entry.family.name == "AF_INET" and not entry.address.startswith("127.")
    ]


def _fabric() -> list[str]:
    """Name, rate and state of every InfiniBand or RoCE port."""
    ports = sorted(_INFINIBAND.glob("*/ports/*"))
    if not ports:
        return ["no InfiniBand"]
    return [
        f"{p.parent.parent.name}:{p.name} {_line(p / 'rate')} {_line(p / 'state')}" for p in ports
    ]


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return "?"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.strip()
