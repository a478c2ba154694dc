"""``megalr memory``: memory of a run per GPU, before renting the GPUs, and what fits."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalr.cli.command_line import (
    add_run_options,
    config_files,
    deepspeed_config,
    new_parser,
    parse_run,
)
from megalr.errors import UserError

if TYPE_CHECKING:
    from megalr.config.schema import RunConfig
    from megalr.estimate.proposals import Proposal

MOST = 8
"""Proposals that are printed."""


def memory_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line; what is not an option is an override ``section.key=value``."""
    parser = new_parser("memory", prog)
    add_run_options(parser)
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="GPUs of the whole run")
    add("--tensor", type=int, help="short for parallel.tensor=...; with --fit the only one tried")
    add("--fit", metavar="SIZE", help="memory of a GPU (24GiB, 24GB, 24): propose ways that fit")
    add("--json", action="store_true", help="print JSON, in bytes")
    return parser


def memory_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, estimate or search, print."""
    arguments = parse_run(memory_parser(prog), words)
    files = config_files(arguments)
    if arguments.tensor is not None:
        arguments.overrides.append(f"parallel.tensor={arguments.tensor}")
    if arguments.fit is not None and arguments.deepspeed_config is not None:
        raise UserError(
            f"--deepspeed_config {arguments.deepspeed_config} with --fit, which chooses the ZeRO "
            "stage: leave it out"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from megalr.config.loading import load_run_config
    from megalr.hf.init_from_pretrained import with_pretrained_sizes
    from megalr.models.config import PRESETS

    config = load_run_config(files, arguments.overrides, presets=PRESETS)
    config = with_pretrained_sizes(config)
    if arguments.fit is None:
        print(_estimate(config, arguments))
    else:
        print(_fit(config, arguments))


def _estimate(config: RunConfig, arguments: argparse.Namespace) -> str:
    from megalr.estimate.memory import estimate_memory
    from megalr.estimate.tensors import parameter_counts
    from megalr.models.build import sizes_of

    ds_user, source = deepspeed_config(arguments.deepspeed_config)
    estimate = estimate_memory(config, ds_user, source, arguments.gpus)
    counts = parameter_counts(sizes_of(config), config.method)
    if arguments.json:
        found = {"gpus": arguments.gpus, "parameters": counts, **estimate.as_json()}
        return json.dumps(found, indent=2)
    return (
        f"{_described(counts)}\n"
        f"one of {arguments.gpus} GPUs, micro-batch {config.train.micro_batch_size} x "
        f"{config.data.sequence_length}, {estimate.states.wrapper}, GiB:\n{estimate.table()}"
    )


def _described(counts: dict[str, int]) -> str:
    """All parameters, how many of each kind, and the trained ones where some are not."""
    total = sum(counts.values())
    trained = total - counts.get("frozen matrices", 0)
    rows = {"parameters": total, **{f"  {kind}": number for kind, number in counts.items()}}
    if trained != total:
        rows["trained parameters"] = trained
    return "\n".join(f"{name:<34}{number:>16,}" for name, number in rows.items()) + "\n"


def _fit(config: RunConfig, arguments: argparse.Namespace) -> str:
    from megalr.estimate.memory import GIB
    from megalr.estimate.proposals import memory_size, proposals

    room = memory_size(arguments.fit)
    found = proposals(config, room, arguments.gpus, arguments.tensor)[:MOST]
    if arguments.json:
        return json.dumps([_proposal_json(way) for way in found], indent=2)
    lines = [
        f"{arguments.gpus} GPUs of {room / GIB:.1f} GiB, {config.train.global_batch_size} x "
        f"{config.data.sequence_length} tokens per update; the fastest expected first:",
        f"    {'TP':>2}  ZeRO  micro-batch  {'recomputed':<11}  GiB needed  expected speed",
    ]
    for number, way in enumerate(found, 1):
        train, speed = way.config.train, found[0].seconds / way.seconds
        lines.append(
            f"{number}.  {way.config.parallel.tensor:>2}  {way.stage:>4}  "
            f"{train.micro_batch_size:>11}  {train.activation_checkpointing:<11}  "
            f"{way.estimate.needed / GIB:>10.2f}  {speed:>14.0%}"
        )
        lines += textwrap.wrap(
            " ".join(way.words) or "as configured",
            80,
            initial_indent=" " * 4,
            subsequent_indent=" " * 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _proposal_json(way: Proposal) -> dict[str, Any]:
    return {
        "words": list(way.words),
        "tensor": way.config.parallel.tensor,
        "zero_stage": way.stage,
        "micro_batch_size": way.config.train.micro_batch_size,
        "activation_checkpointing": way.config.train.activation_checkpointing,
        "expected_tokens_per_second": round(way.tokens_per_second),
        **way.estimate.as_json(),
    }
