"""Memory of a run per GPU, before renting the GPUs.

python tools/estimate_memory.py --config recipes/llama_1b_low_rank.yaml train.compile=true --gpus 8
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megalr.config.loading import load_run_config
from megalr.engine.config import read_deepspeed_json
from megalr.errors import exit_cleanly
from megalr.estimate.memory import estimate_memory
from megalr.hf.init_from_pretrained import with_pretrained_sizes
from megalr.models.config import PRESETS


def parse_arguments() -> argparse.Namespace:
    """The command line; what is not an option is an override ``section.key=value``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, type=Path, help="one or several YAML files")
    add("--deepspeed_config", type=Path, help="DeepSpeed JSON (default: ZeRO stage 1)")
    add("--gpus", type=int, required=True, help="GPUs of the whole run")
    add("--tensor", type=int, help="short for parallel.tensor=...")
    add("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    # Overrides right after --config are taken for files; no file of ours has "=" in its name.
    arguments.overrides += [str(path) for path in arguments.config if "=" in str(path)]
    arguments.config = [path for path in arguments.config if "=" not in str(path)]
    if arguments.tensor is not None:
        arguments.overrides.append(f"parallel.tensor={arguments.tensor}")
    return arguments


def main() -> None:
    """Parse, estimate, print."""
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    config = load_run_config(arguments.config, arguments.overrides, presets=PRESETS)
    config = with_pretrained_sizes(config)
    ds_user, source = {"zero_optimization": {"stage": 1}}, "default DeepSpeed config"
    if arguments.deepspeed_config is not None:
        source = str(arguments.deepspeed_config)
        ds_user = read_deepspeed_json(arguments.deepspeed_config)
    estimate = estimate_memory(config, ds_user, source, arguments.gpus)
    print(
        f"one of {arguments.gpus} GPUs, micro-batch {config.train.micro_batch_size} x "
        f"{config.data.sequence_length}, {estimate.states.wrapper}, GiB:"
    )
    print(estimate.table())


if __name__ == "__main__":
    exit_cleanly(main)
