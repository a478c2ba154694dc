"""Two hosts with addresses of their own on this machine: network namespaces joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

IP = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def why_not() -> str | None:
    """Why there can be no network namespaces here; None if there can."""
    if IP is None:
        return "no ip command: apt-get install iproute2"
    probe = f"megalr-probe-{os.getpid()}"
    done = subprocess.run([IP, "netns", "add", probe], capture_output=True, text=True)
    if done.returncode != 0:
        return f"network namespaces are not permitted: {done.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


class Hosts:
    """Two hosts, ``0`` and ``1``, with host names, at 10.77.0.1 and 10.77.0.2.

    Each calls itself by a name that leads to the loopback, as many systems do, and knows the other
    by ``node0`` or ``node1``.
    """

    def __init__(self) -> None:
        self.names = [f"megalr-{os.getpid()}-{number}" for number in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))

    def __enter__(self) -> Hosts:
        cables = [f"mlr{os.getpid() % 100000}{end}" for end in "ab"]
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(self.names, cables, self.addresses, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "link", "set", cable, "name", "fabric0")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "fabric0")
            _ip("-n", name, "link", "set", "fabric0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        for number in range(2):
            lines = ["127.0.0.1 localhost"]
            for other, address in enumerate(self.addresses):
                lines.append(f"{'127.0.1.1' if other == number else address} node{other}")
            (self.folder / f"hosts{number}").write_text("\n".join(lines) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run([str(IP), "netns", "del", name], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def prefix(self, number: int) -> list[str]:
        """What stands before a command that runs on a host, with its name and its /etc/hosts."""
        setup = f"mount --bind {self.folder}/hosts{number} /etc/hosts && hostname node{number}"
        shell = ["unshare", "--mount", "--uts", "sh", "-c", f'{setup} && exec "$0" "$@"']
        return [str(IP), "netns", "exec", self.names[number], *shell]

    def start(
        self, number: int, command: list[str], cwd: Path, environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command on a host."""
        return subprocess.Popen(
            [*self.prefix(number), *command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def write_ssh(self) -> Path:
        """Folder with an ``ssh`` that knows these hosts and asks for no password."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        prefixes = {f"node{number}": self.prefix(number) for number in range(2)}
        program = folder / "ssh"
        program.write_text(
            "#!/usr/bin/env python3\n"
            "import os, sys\n"
            f"prefixes = {prefixes!r}\n"
            "place = next(n for n, word in enumerate(sys.argv) if word in prefixes)\n"
            "command = [*prefixes[sys.argv[place]], 'sh', '-c', ' '.join(sys.argv[place + 1:])]\n"
            "os.execv(command[0], command)\n"
        )
        program.chmod(0o755)
        return folder

    def cut(self) -> None:
        """Pull the cable, at both ends."""
        for name in self.names:
            _ip("-n", name, "link", "set", "fabric0", "down")

    def plug(self) -> None:
        """Put the cable in again."""
        for name in self.names:
            _ip("-n", name, "link", "set", "fabric0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run([str(IP), *arguments], check=True, capture_output=True, text=True)
