"""What every recorded result says about where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megalr.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance(packages: tuple[str, ...]) -> dict[str, Any]:
    """Command, commit, processor, cores, load, versions and date of a measurement."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    names = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    return {
        "command": "python benchmarks/" + " ".join([Path(names[0]).name, *names[1:]]),
        "commit": git.stdout.strip() or "unknown",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    write_atomic(folder / f"{name}.json", f"{text}\n".encode())
    print(text)
    return folder / f"{name}.json"


def save_measured(name: str, device: str, measured: dict[str, Any], folder: Path | None) -> None:
    """Numbers of a device with their provenance, as ``NAME.json``; nothing without a folder."""
    if folder is not None:
        save(name, {"device": device, **provenance(("torch",)), **measured}, folder)
