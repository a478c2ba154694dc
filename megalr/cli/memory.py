"""``megalr memory``: memory of a run per GPU, before renting the GPUs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megalr.cli.command_line import (
    add_run_options,
    config_files,
    deepspeed_config,
    new_parser,
    parse_run,
)


def memory_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line; what is not an option is an override ``section.key=value``."""
    parser = new_parser("memory", prog)
    add_run_options(parser)
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="GPUs of the whole run")
    add("--tensor", type=int, help="short for parallel.tensor=...")
    return parser


def memory_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, estimate, print."""
    arguments = parse_run(memory_parser(prog), words)
    files = config_files(arguments)
    if arguments.tensor is not None:
        arguments.overrides.append(f"parallel.tensor={arguments.tensor}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.config.loading import load_run_config
    from megalr.estimate.memory import estimate_memory
    from megalr.estimate.tensors import parameter_counts
    from megalr.hf.init_from_pretrained import with_pretrained_sizes
    from megalr.models.build import sizes_of
    from megalr.models.config import PRESETS

    config = load_run_config(files, arguments.overrides, presets=PRESETS)
    config = with_pretrained_sizes(config)
    ds_user, source = deepspeed_config(arguments.deepspeed_config)
    estimate = estimate_memory(config, ds_user, source, arguments.gpus)
    print(_described(parameter_counts(sizes_of(config), config.method)))
    print(
        f"one of {arguments.gpus} GPUs, micro-batch {config.train.micro_batch_size} x "
        f"{config.data.sequence_length}, {estimate.states.wrapper}, GiB:"
    )
    print(estimate.table())


def _described(counts: dict[str, int]) -> str:
    """Two lines: all parameters and the trained ones; how many of each kind."""
    total = sum(counts.values())
    trained = total - counts.get("frozen matrices", 0)
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in counts.items())
    return f"parameters: {total:,}; trained: {trained:,}\n{kinds}"
