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

from megalr.errors import UserError
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
    path = folder / f"{name}.json"
    print(write(path, result))
    return path


def write(path: Path, result: dict[str, Any]) -> str:
    """Write a JSON file, whole or not at all; returns its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    write_atomic(path, f"{text}\n".encode())
    return text


def stopped(path: Path | None, result: dict[str, Any], same: tuple[str, ...]) -> dict[str, Any]:
    """What a call that was stopped left in a file, to go on from; empty without such a file.

    ``result["earlier"]`` becomes the list of the calls that wrote the file.

    Args:
        path: the JSON file; None for none.
        result: the provenance of this call.
        same: keys whose values have to be those of the file: rows of two devices, or of two
            versions of a library, do not belong in one table.

    Raises:
        UserError: the file holds no result, or one with another value of these keys.
    """
    if path is None or not path.exists():
        return {}
    advice = "name another file or give --again, which measures anew and overwrites it"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be continued ({error}): {advice}") from error
    for key in same:
        value = found.get(key) if isinstance(found, dict) else None
        if value != result[key]:
            raise UserError(
                f"{path} was measured with {key} {value}, here it is {result[key]}: {advice}"
            )
    call = {key: found[key] for key in ("command", "commit", "date", "load_before") if key in found}
    result["earlier"] = [*found.get("earlier", []), call]
    return dict(found)


def save_measured(name: str, device: str, measured: dict[str, Any], folder: Path | None) -> None:
    """Numbers of a device with their provenance, as ``NAME.json``; nothing without a folder."""
    if folder is not None:
        save(name, {"device": device, **provenance(("torch",)), **measured}, folder)
