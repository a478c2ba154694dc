"""Small run folders with invented metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HOUR = 3600.0
KINDS = ("q", "down")


def make_run(
    folder: Path,
    rank: int = 8,
    losses: tuple[float, ...] = (6.0, 5.0, 4.0),
    changes: dict[str, Any] | None = None,
) -> Path:
    """A run of a few updates with a restart, as versions before spectra and times recorded it."""
    events: list[dict[str, Any]] = [
        {"event": "start", "update": 0, "model": "llama_9m", "method": "low_rank", "world_size": 2}
    ]
    for number, loss in enumerate(losses, start=1):
        step = {"loss": loss, "tokens": 1000 * number, "tokens_per_second": 50.0 * number}
        events.append({"event": "step", "update": 10 * number, "mfu": "n/a", **step})
        events.append(
            {"event": "eval", "update": 10 * number, "loss": loss, "perplexity": 100.0 / number}
        )
    events.append({"event": "restart", "update": 20, "refactorize_seconds": 0.5})
    config = {"method": {"name": "low_rank", "rank": rank}, "run": {"seed": 42}}
    for key, value in (changes or {}).items():
        section, name = key.split(".")
        config.setdefault(section, {})[name] = value
    return write_run(folder, events, config)


def make_long_run(folder: Path, updates: int = 400, lr: float = 1e-3, level: float = 2.0) -> Path:
    """A run with everything a report shows: two starts an hour apart, spectra, a rollback.

    Every update takes 0.01 h, start-up 0.1 h; the second start resumes from update 200.
    """
    events: list[dict[str, Any]] = []
    start = {"event": "start", "model": "llama_9m", "method": "low_rank", "optimizer": "adamw"}
    start |= {"world_size": 2, "parameters": 9_000_000, "startup_seconds": 0.1 * HOUR}
    events.append({**start, "update": 0, "time": 1e9})
    time = 1e9
    for update in range(4, updates + 1, 4):
        time += 4 * 0.01 * HOUR
        if update == 204:
            time += HOUR
            events.append({**start, "update": 200, "time": time})
            resume = {"event": "resume", "path": "checkpoints/update_200", "allowed": []}
            events.append({**resume, "update": 200, "time": time})
            time += 4 * 0.01 * HOUR
        loss = level + 4.0 / update
        step = {"loss": loss, "gradient_norm": 1.0 / update, "learning_rate": lr / update}
        step |= {"tokens": 512 * update, "tokens_per_second": 5000.0, "peak_memory_gib": 1.5}
        events.append({"event": "step", "update": update, "time": time, **step})
        if update % 40 == 0:
            evaluation = {"loss": loss, "perplexity": 2.7**loss, "tokens": 4096}
            events.append({"event": "eval", "update": update, "time": time, **evaluation})
        if update % 100 == 0:
            restart = {"trigger": "period", "refactorized": True, "reset": True}
            events.append({"event": "restart", "update": update, "time": time, **restart})
            events[-1]["spectra"] = {kind: _spectrum(update) for kind in KINDS}
    rollback = {"reason": "spike", "to_update": updates - 8, "time": time}
    events.append({"event": "rollback", "update": updates, **rollback})
    config = {"method": {"name": "low_rank", "rank": 8}, "optimizer": {"name": "adamw", "lr": lr}}
    return write_run(folder, events, config)


def _spectrum(update: int) -> dict[str, Any]:
    quantiles = [0.0, *(update * level for level in (1, 2, 3, 4, 5, 6))]
    return {"rank": 8, "effective_rank": 4.0, "imbalance": 1 / update, "singular_values": quantiles}


def write_run(folder: Path, events: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """A run's folder with these events and this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_events(folder, events)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def write_events(folder: Path, events: list[dict[str, Any]], tail: str = "") -> None:
    """Replace a run's metrics."""
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
