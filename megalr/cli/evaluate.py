"""``megalr evaluate``: perplexity of a checkpoint or of an exported model; or lm-eval's tasks.

Prints one line of JSON on standard output and a readable line on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalr.cli.command_line import LAUNCHERS, add_gpus, new_parser, parse, without_option
from megalr.cli.train import ranks_to_start, start_ranks
from megalr.errors import UserError

FLAGS = {"true": True, "false": False, None: None}
DTYPES = ("float32", "bfloat16", "float16")


def natural(text: str) -> int:
    """A whole number that is not negative."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def positive(text: str) -> int:
    """A whole number above 0."""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


def evaluate_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr evaluate``."""
    parser = new_parser("evaluate", prog, "Prints JSON on standard output.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder of a run")
    what.add_argument("--model", type=Path, help="folder with a transformers model")
    add("--tag", help="checkpoint of --run, for example update_1000 (default: the newest)")
    add("--data", nargs="+", default=[], help="preprocessed folders (default: the run's)")
    add("--split", default="validation", choices=("validation", "train"), help="of the folders")
    add("--sequence_length", type=positive, help="positions of a sample (default: the run's)")
    add("--packing", choices=("true", "false"), help="windows or documents (default: the run's)")
    add("--document_mask", choices=("true", "false"), help="of windows (default: the run's)")
    add("--tokens", type=natural, help="largest number of targets; 0: all")
    add("--micro_batch_size", type=positive, help="sequences per forward pass and rank")
    add_gpus(parser, "1")
    add("--dtype", choices=DTYPES, help="compute dtype (default: the run's, the model's)")
    add("--tasks", help="lm-eval's tasks for --model, separated by commas")
    add("--num_fewshot", type=natural, help="of --tasks: examples before a question")
    add("--limit", type=positive, help="of --tasks: questions of each task")
    add("--include_path", type=Path, help="of --tasks: folder with further tasks")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser


def _evaluate_tasks(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Results of lm-eval and a readable summary."""
    from megalr.evaluation.lm_eval import run_tasks

    results = run_tasks(
        arguments.model,
        arguments.tasks.split(","),
        arguments.micro_batch_size or 8,
        arguments.num_fewshot,
        arguments.limit,
        arguments.include_path,
    )
    return {"model": str(arguments.model), "tasks": results}, f"{len(results)} tasks evaluated"


def _evaluate_perplexity(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The evaluation as plain values, and a readable summary."""
    from megalr.distributed.process_group import start_distributed
    from megalr.evaluation.offline import Request, evaluate_model, evaluate_run

    request = Request(
        data=tuple(arguments.data),
        split=arguments.split,
        sequence_length=arguments.sequence_length,
        packing=FLAGS[arguments.packing],
        document_mask=FLAGS[arguments.document_mask],
        tokens=arguments.tokens,
        micro_batch_size=arguments.micro_batch_size,
        dtype=arguments.dtype,
    )
    device = start_distributed()
    if arguments.run is not None:
        found = evaluate_run(arguments.run, arguments.tag, request, device)
    else:
        found = evaluate_model(arguments.model, request, device)
    tokens, available = found["tokens"], found["available_tokens"]
    share = "all" if tokens == available else f"{tokens:,} of"
    line = (
        f"{found['model']}: perplexity {found['perplexity']:.4f}, loss {found['loss']:.5f} on "
        f"{share} {available:,} targets of {', '.join(found['data'])} "
        f"({found['eval_seconds']:.1f} s)"
    )
    return found, "\n".join([line, *(f"note: {note}" for note in found["notes"])])


def evaluate_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Evaluate on one GPU, several, or as a rank of a launcher; print on rank 0."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(evaluate_parser(prog), words)
    if arguments.tag is not None and arguments.run is None:
        raise UserError(f"--tag {arguments.tag} belongs to --run: a model has no checkpoints")
    if arguments.tasks is not None and arguments.model is None:
        raise UserError("--tasks needs --model: export the run with `megalr export` first")
    if arguments.gpus is not None:
        if arguments.tasks is not None:
            raise UserError("--gpus with --tasks has no effect: lm-eval runs on one GPU")
        ranks = ranks_to_start(arguments.gpus)
        if ranks is not None:
            program = [str(LAUNCHERS / "evaluate.py"), *without_option(words, "--gpus")]
            return start_ranks(program, *ranks)
    evaluated = _evaluate_tasks if arguments.tasks is not None else _evaluate_perplexity
    with contextlib.redirect_stdout(sys.stderr):  # standard output holds the JSON line only
        found, line = evaluated(arguments)
    from megalr.distributed.agreement import is_rank0

    if is_rank0():
        print(line, file=sys.stderr, flush=True)
        print(json.dumps(found), flush=True)
    return 0
