"""``megalr generate``: text from a run's checkpoint or an exported model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megalr.cli.command_line import new_parser, parse
from megalr.cli.evaluate import DTYPES, natural, positive
from megalr.errors import UserError


def generate_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr generate``."""
    parser = new_parser("generate", prog, "On the GPU, if there is one.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder of a run")
    what.add_argument("--model", type=Path, help="folder with a transformers model")
    add("--tag", help="checkpoint of --run, for example update_1000 (default: the newest)")
    add("--prompt", nargs="+", required=True, metavar="TEXT", help="one or several beginnings")
    add("--max_new_tokens", type=positive, default=100, help="default: %(default)s")
    add("--temperature", type=float, default=1.0, help="0: the most probable token (default: 1)")
    add("--top_p", type=float, default=1.0, help="share of the probability kept (default: 1)")
    add("--seed", type=natural, default=42, help="of the draws (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="compute dtype (default: the run's, the model's)")
    return parser


def generate_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print every prompt with its continuation."""
    arguments = parse(generate_parser(prog), words)
    if arguments.tag is not None and arguments.run is None:
        raise UserError(f"--tag {arguments.tag} belongs to --run: a model has no checkpoints")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature is {arguments.temperature}: give 0 or more")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top_p is {arguments.top_p}: give more than 0, at most 1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    import torch

    from megalr.evaluation.generate import (
        Sampling,
        sample_text,
        text_model_of_folder,
        text_model_of_run,
    )

    if arguments.run is not None:
        source = text_model_of_run(arguments.run, arguments.tag, arguments.dtype)
    else:
        source = text_model_of_folder(arguments.model, arguments.dtype)
    source.model.to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    for number, prompt in enumerate(arguments.prompt):
        print(("\n" if number else "") + sample_text(source, prompt, sampling), flush=True)
