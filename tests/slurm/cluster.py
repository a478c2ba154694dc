"""A real SLURM on this machine: one slurmctld and several slurmd, each a node of its own.

    python -m tests.slurm.cluster start FOLDER     # then: export SLURM_CONF=FOLDER/slurm.conf
    python -m tests.slurm.cluster stop FOLDER

Nodes are called 127.0.0.2, 127.0.0.3 and so on, so that a node's name leads to it without a name
server. Each has two "GPUs", which are empty files. Jobs of partition ``high`` preempt those of
``low``. Everything lives in FOLDER, nothing outside it is changed, and no privilege is needed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Also how long a requeued job waits for its old credentials to expire.
AuthInfo=socket={folder}/munge.socket,cred_expire=3
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=20
MessageTimeout=5
SlurmdTimeout=6
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


def missing_programs() -> list[str]:
    """Which of SLURM's and munge's programs are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nothing listens on at this moment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, detail: Callable[[], str] = str
) -> None:
    """Wait for a condition; TimeoutError saying ``what`` was expected, with details."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}\n{detail()}")
        time.sleep(0.1)


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """The cluster in ``folder``; a short path, since sockets lie in it."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder
        self.nodes = [f"127.0.0.{2 + number}" for number in range(nodes)]
        self.environment = {
            **os.environ,
            "PATH": SEARCH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Write the configuration, start all daemons, wait until every node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        self._configure()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        names |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        # --force: it dislikes folders that others may write to, such as the system's for
        # temporary files, above its own.
        self._run("munged", "--force", *(f"--{k}={self.folder / v}" for k, v in names.items()))
        self._run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        states = ["idle"] * len(self.nodes)
        wait_until(
            lambda: self.query("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == states,
            30,
            "all nodes idle",
            self._logs,
        )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """The node dies: its slurmd and all that runs under it get SIGKILL at once."""
        main = int((self.folder / f"slurmd-{node}.pid").read_text())
        victims = [main]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # processes come and go
                environment = (process / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in environment:
                    victims.append(int(process.name))
                title = (process / "cmdline").read_bytes()
                if title.startswith(b"slurmstepd") and self._is_step_of(process, node):
                    victims.append(int(process.name))
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)

    def _is_step_of(self, process: Path, node: str) -> bool:
        """Whether a slurmstepd has a file of this node's spool or log open."""
        places = (str(self.folder / f"spool-{node}"), str(self.folder / f"slurmd-{node}.log"))
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(places):
                    return True
        return False

    def stop(self) -> None:
        """Cancel all jobs and end all daemons of this cluster."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.query("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
            self.query("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self.query("squeue", "-h"), 10, "no jobs left")
        daemons = []
        for path in [*self.folder.glob("slurm*.pid"), self.folder / "munged.pid"]:
            with contextlib.suppress(OSError, ValueError):
                daemons.append(int(path.read_text()))
        for number in (signal.SIGTERM, signal.SIGKILL):  # in good order they save their state
            for daemon in daemons:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(daemon, number)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not any(map(_is_alive, daemons)), 10, "daemons have ended")
                return

    def query(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    def _run(self, program: str, *arguments: str) -> None:
        path = str(shutil.which(program, path=SEARCH))
        log = self.folder / "start.log"
        with log.open("a") as output:
            done = subprocess.run(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=30,
            )
        if done.returncode != 0:
            raise RuntimeError(f"{program} did not start\n{self._logs()}")

    def _configure(self) -> None:
        ports = free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr={node} Port={port} "
            "CPUs=4 RealMemory=4000 Gres=gpu:2"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=socket.gethostname(),
            control_port=ports[0],
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for number in range(2):
            (self.folder / f"gpu{number}").touch()

    def _logs(self) -> str:
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-8:]]
        return "\n".join(parts)


def main() -> None:
    """``start FOLDER`` or ``stop FOLDER``."""
    action, folder = sys.argv[1:]
    cluster = Cluster(Path(folder).resolve())
    {"start": cluster.start, "stop": cluster.stop}[action]()
    print(f"{action}: done; export SLURM_CONF={cluster.folder}/slurm.conf")


if __name__ == "__main__":
    main()
