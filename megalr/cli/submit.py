"""``megalr submit``: a run as a SLURM job that saves in time, requeues itself and continues."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megalr.cli.command_line import (
    LAUNCHERS,
    PACKAGE,
    add_run_options,
    config_files,
    deepspeed_config,
    find_file,
    new_parser,
    parse_run,
)
from megalr.errors import UserError

TEMPLATE = LAUNCHERS / "slurm" / "pretrain.sbatch"
OWN_NAMES = {"job-name": "name", "output": "log"}
"""Options of this program that have another name in SLURM."""


def submit_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr submit``."""
    parser = new_parser(
        "submit",
        prog,
        "The run is checked, the header of launchers/slurm/pretrain.sbatch filled, and the script "
        "given to sbatch. A file that stands alone is the same as --config FILE.",
    )
    add_run_options(parser)
    add = parser.add_argument
    add("--nodes", type=int, required=True, help="number of nodes")
    add("--gpus", type=int, required=True, help="GPUs, and ranks, of each node")
    add("--time", required=True, help="time limit of one start, D-HH:MM:SS")
    add("--cpus", type=int, help="processor cores of each rank (default: header's)")
    add("--partition", help="partition (default: the cluster's)")
    add("--account", help="account that is charged (default: yours)")
    add("--name", help="name of the job (default: the recipe's)")
    add("--log", help="the job's log (default: the header's)")
    add("--launch", choices=["srun", "torchrun"], default="srun")
    add("--dry_run", action="store_true", help="print the script, submit nothing")
    return parser


def submit_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Check, fill, submit or print."""
    arguments = parse_run(submit_parser(prog), words, bare_config=True)
    files = config_files(arguments)
    from megalr.distributed.slurm_script import submit_script

    _check_options(arguments)
    script = fill(slurm_template(), arguments)
    with contextlib.redirect_stdout(sys.stderr):  # importing DeepSpeed prints
        _check_run(arguments, files)
    if arguments.dry_run:
        print(script, end="")
        return
    print(submit_script(script), end="")


def slurm_template() -> str:
    """The batch script of a run; from an installed package, with the paths of this installation."""
    text = TEMPLATE.read_text(encoding="utf-8")
    if LAUNCHERS.is_relative_to(PACKAGE):
        for name, place, path in (
            ("PYTHON", ".venv/bin/python", sys.executable),
            ("PRETRAIN", "launchers/pretrain.py", LAUNCHERS / "pretrain.py"),
        ):
            line = f"{name}=${{{name}:-{shlex.quote(str(path))}}}"
            text = text.replace(f"{name}=${{{name}:-{place}}}", line)
    return text


def fill(template: str, arguments: argparse.Namespace) -> str:
    """The batch script with this header and this run.

    Raises:
        UserError: a value of the header is not one word, or an argument is not UTF-8.
    """
    from megalr.distributed.slurm_script import fill_header

    name = arguments.name
    if name is None:
        name = re.sub(r"[^\w.+-]+", "_", find_file(arguments.config[0]).stem)
    header = {
        "job-name": name,
        "nodes": arguments.nodes,
        "gpus-per-node": arguments.gpus,
        "ntasks-per-node": arguments.gpus,
        "cpus-per-task": arguments.cpus,
        "time": arguments.time,
        "output": arguments.log,
        "partition": arguments.partition,
        "account": arguments.account,
    }
    run = ["--config", *arguments.config]
    if arguments.deepspeed_config is not None:
        run += ["--deepspeed_config", arguments.deepspeed_config]
    run += arguments.overrides
    command = [f"set -- {shlex.join(run)}", f"LAUNCH={shlex.quote(arguments.launch)}"]
    return fill_header(template, header, command, OWN_NAMES)


def _check_options(arguments: argparse.Namespace) -> None:
    from megalr.distributed.slurm_script import check_time

    for name in ("nodes", "gpus", "cpus"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    check_time(arguments.time)


def _check_run(arguments: argparse.Namespace, files: Sequence[Path]) -> None:
    """Refuse a run that would fail after hours in the queue."""
    from megalr.config.loading import load_run_config
    from megalr.engine.config import resolve_deepspeed_config
    from megalr.models.config import PRESETS

    config = load_run_config(files, arguments.overrides, presets=PRESETS)
    ds_user, source = deepspeed_config(arguments.deepspeed_config)
    world = arguments.nodes * arguments.gpus
    ranks_of_a_model = config.parallel.tensor
    if world % ranks_of_a_model:
        raise UserError(
            f"parallel.tensor is {ranks_of_a_model} but {arguments.nodes} nodes x {arguments.gpus} "
            f"GPUs are {world} ranks: make it a divisor"
        )
    resolved = resolve_deepspeed_config(config, ds_user, source, world // ranks_of_a_model)
    from megalr.engine.build import check_run  # torch takes a second: after what needs none

    check_run(config, resolved["zero_optimization"]["stage"])
