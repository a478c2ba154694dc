"""Every method for a few updates of a small model on real text: does it learn, how well, how fast.

    python benchmarks/methods.py --train DATA --validation DATA --output benchmarks/results

Runs ``launchers/pretrain.py`` for each method with its published settings where the recipes of 60M
have them, the learning rate chosen for this short run. ``--parallel`` runs go on at a time, shared
out over the GPUs, so seconds are not compared. Writes methods_9m.json after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from megalr.errors import exit_cleanly

ROOT = Path(__file__).resolve().parent.parent
FACTORS = {"rank": 32, "alpha": 32.0}
GAP = {"rank": 32, "update_proj_gap": 50}
METHODS: dict[str, dict[str, Any]] = {
    "full_rank": {"method": {"name": "full_rank"}, "optimizer": {"lr": 2e-3}},
    "low_rank": {"method": {"name": "low_rank", **FACTORS}, "optimizer": {"lr": 3e-3}},
    "low_rank_restarts": {
        "method": {"name": "low_rank", **FACTORS},
        "optimizer": {"lr": 3e-3},
        "restarts": {"every": 50, "lr_recovery": "linear"},
    },
    "sltrain": {
        "method": {"name": "sltrain", "density": 0.03, **FACTORS},
        "optimizer": {"lr": 3e-3},
    },
    "lora": {"method": {"name": "lora", **FACTORS}, "optimizer": {"lr": 3e-3}},
    "relora": {
        "method": {"name": "relora", "merge_every": 50, **FACTORS},
        "optimizer": {"lr": 3e-3},
        "schedule": {
            "name": "cosine_restarts",
            "warmup_updates": 20,
            "cycle_updates": 50,
            "restart_warmup_updates": 10,
        },
    },
    "cola": {"method": {"name": "cola", "rank": 32}, "optimizer": {"lr": 3e-3}},
    "dlr": {
        "method": {
            "name": "low_rank",
            "rank": 32,
            "alpha": 32.0,
            "init": "normal",
            "dlr_alpha": 1.0,
        },
        "optimizer": {"lr": 3e-3},
    },
    "galore": {"method": {"name": "galore", "scale": 0.25, **GAP}, "optimizer": {"lr": 1e-2}},
    "fira": {"method": {"name": "fira", "scale": 0.25, **GAP}, "optimizer": {"lr": 1e-2}},
    "apollo": {"method": {"name": "apollo", **GAP}, "optimizer": {"lr": 1e-2}},
    "apollo_mini": {
        "method": {"name": "apollo_mini", "update_proj_gap": 50},
        "optimizer": {"lr": 1e-2},
    },
    "golore": {"method": {"name": "golore", **GAP}, "optimizer": {"lr": 3e-3}},
    "loro": {"method": {"name": "loro", "rank": 32, "exact_every": 50}, "optimizer": {"lr": 1e-2}},
    "spam": {"optimizer": {"name": "spam", "lr": 2e-3, "update_gap": 100, "warmup_epoch": 20}},
    "stable_spam": {"optimizer": {"name": "stable_spam", "lr": 2e-3, "update_gap": 100}},
    "muon": {"optimizer": {"name": "muon", "lr": 2e-2, "adam_lr_ratio": 0.1}},
    "scale": {"optimizer": {"name": "scale", "lr": 1e-3, "lr_ratio": {"norms": 20.0}}},
}


def run_method(
    name: str, arguments: argparse.Namespace, work: Path, gpu: int | None
) -> dict[str, Any]:
    """One run; its perplexities by update, or the end of its output if it failed."""
    config = {
        "run": {"dir": str(work / name)},
        "model": {"preset": "llama_9m"},
        "schedule": {"warmup_updates": 20},
        "data": {"train": str(arguments.train), "validation": str(arguments.validation)},
        "train": {"updates": 200, "global_batch_size": 128, "micro_batch_size": 128},
        "evaluation": {"every": 100},
        "checkpoint": {"every": 0},
        "log": {"every": 50, "tensorboard": False},
        **METHODS[name],
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(path)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode != 0:
        return {"method": name, "failed": (done.stdout + done.stderr)[-1500:]}
    lines = (work / name / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    start = next(event for event in events if event["event"] == "start")
    return {
        "method": name,
        "settings": METHODS[name],
        "parameters": start["parameters"],
        "trainable_parameters": start["trainable_parameters"],
        "perplexity": {e["update"]: e["perplexity"] for e in events if e["event"] == "eval"},
        "versions": start["versions"],
    }


def main() -> None:
    """Run all chosen methods and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="preprocessed data set")
    parser.add_argument("--validation", type=Path, required=True, help="preprocessed data set")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parallel", type=int, default=4, help="runs at a time")
    parser.add_argument("--commit", default="unknown", help="commit to note in the result")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    import torch

    gpus = torch.cuda.device_count()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(arguments.parallel) as pool:
        runs = [
            pool.submit(run_method, name, arguments, Path(work), number % gpus if gpus else None)
            for number, name in enumerate(arguments.methods)
        ]
        for run in as_completed(runs):
            result = run.result()
            results.append(result)
            print(result["method"], result.get("perplexity") or result["failed"], flush=True)
            record = {"commit": arguments.commit, "results": results}
            text = json.dumps(record, indent=1) + "\n"
            (arguments.output / "methods_9m.json").write_text(text)


if __name__ == "__main__":
    exit_cleanly(main)
