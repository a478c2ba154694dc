"""``megalr train``: one run, in this process as a rank of a launcher or alone, or in several.

``megalr train`` starts a rank per GPU. ``launchers/pretrain.py`` is the same program for the other
launchers, and one process under plain python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.cli.command_line import (
    LAUNCHERS,
    add_gpus,
    add_run_options,
    config_files,
    deepspeed_config,
    new_parser,
    parse_run,
    without_option,
)
from megalr.distributed.signals import STOPPED, StopRequest
from megalr.errors import LOCAL_RANK_VARIABLES, AgreedError, UserError, launched_number

if TYPE_CHECKING:
    from megalr.config.schema import RunConfig


def train_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line; positional words are overrides ``section.key=value``."""
    parser = new_parser(
        "train",
        prog,
        "It starts a process per GPU; under deepspeed, torchrun, mpirun or srun it is one of "
        "theirs. The same command continues a run. Exit code 75: stopped on request, after saving.",
    )
    add_run_options(parser)
    add = parser.add_argument
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="instead of --config: folder of a run to continue with its own configuration and "
        "DeepSpeed JSON",
    )
    add_gpus(parser, "all visible; launchers/pretrain.py: 1")
    add("--print_config", action="store_true", help="print the resolved run and stop")
    add(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="keys that may differ from the run in run.dir (docs/checkpoints.md)",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser


def train_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train on the GPUs of this machine, or as a rank of a launcher.

    Returns:
        0 if finished, 75 if stopped on request (docs/health.md).
    """
    return _train(words, prog, alone=False)


def pretrain_command(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """As :func:`train_command`, but one process unless ``--gpus`` is given."""
    return _train(words, prog, alone=True)


def _train(words: Sequence[str] | None, prog: str | None, alone: bool) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = parse_run(train_parser(prog), words, lists=("config", "allow"))
    if arguments.resume is not None and arguments.config:
        raise UserError("--config and --resume are both given: --resume takes the run's own files")
    request = StopRequest()
    if not arguments.print_config:
        request.listen()
    wants = arguments.gpus is not None or not (alone or arguments.print_config)
    ranks = ranks_to_start(arguments.gpus) if wants else None
    if ranks is None:
        return _rank(arguments, request)
    if request.signal:  # it came while torch was imported
        return STOPPED
    return start_ranks([str(LAUNCHERS / "pretrain.py"), *without_option(words, "--gpus")], *ranks)


def ranks_to_start(wanted: int | Sequence[str] | None) -> tuple[int, list[str]] | None:
    """Number of ranks to start on this machine, and the GPUs to show them (empty: as they are).

    None if this process is to be the only rank, or a launcher has made it a rank.

    Args:
        wanted: how many GPUs, or which; None: all. Without a GPU, how many processes; None: one.

    Raises:
        UserError: ``wanted`` is given under a launcher, this machine has not got these GPUs, or it
            is one of several of a SLURM job.
    """
    from megalr.distributed.launcher_env import number_of_processes

    if "RANK" in os.environ or number_of_processes() > 1:
        if wanted is not None:
            raise UserError("--gpus under a launcher has no effect: remove it, or the launcher")
        return None
    from megalr.distributed.local_ranks import choose_gpus, visible_gpus

    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if wanted is None and nodes != "1":
        raise UserError(
            f"this SLURM job has {nodes} nodes: put srun before the command, or give --gpus for "
            "the GPUs of this node alone"
        )
    there = [] if os.environ.get("DS_ACCELERATOR") == "cpu" else visible_gpus()
    if not there and isinstance(wanted, int):
        if wanted < 1:
            raise UserError(f"--gpus is {wanted}: give 1 or more")
        print(f"no GPU is visible: {wanted} processes on the CPU", file=sys.stderr, flush=True)
        return (wanted, []) if wanted > 1 else None
    gpus = choose_gpus(wanted, there)
    if gpus == there:
        return (len(gpus), []) if len(gpus) > 1 else None
    return len(gpus), gpus


def start_ranks(program: Sequence[str], ranks: int, gpus: Sequence[str]) -> int:
    """Run the program in that many processes; the exit code."""
    from megalr.distributed.local_ranks import LocalRanks

    return LocalRanks(program, ranks, gpus).run()


def _read_run(arguments: argparse.Namespace) -> tuple[RunConfig, dict[str, Any], str]:
    """The run's configuration, the user's DeepSpeed JSON, and the name of that in messages.

    Raises:
        UserError: one line per problem.
    """
    run, given = arguments.resume, arguments.deepspeed_config
    files = config_files(arguments) if run is None else []
    from megalr.config.loading import load_run_config
    from megalr.config.resuming import check_allowed
    from megalr.models.config import PRESETS
    from megalr.run.folder import DS_CONFIG, stored_config

    if run is None:
        config = load_run_config(files, arguments.overrides, presets=PRESETS)
    else:
        config = stored_config(run, arguments.overrides, PRESETS)
    check_allowed(arguments.allow)
    if run is None or given is not None:
        return config, *deepspeed_config(given)
    from megalr.engine.config import read_deepspeed_json, reopened

    return config, reopened(read_deepspeed_json(run / DS_CONFIG)), str(run / DS_CONFIG)


def _rank(arguments: argparse.Namespace, request: StopRequest) -> int:
    """Train as one rank, or print the resolved run; the exit code."""
    if arguments.print_config:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    try:  # Every rank reads the same files, so every rank finds the same mistakes.
        config, ds_user, source = _read_run(arguments)
    except UserError as error:
        if launched_number(LOCAL_RANK_VARIABLES) == 0:
            raise
        raise AgreedError(str(error)) from error
    if arguments.print_config:
        _print_config(config, ds_user, source)
        return 0
    from megalr.distributed.peer_errors import name_lost_peers
    from megalr.training.pretrain import pretrain

    with name_lost_peers(config.run.timeout_seconds):
        return pretrain(config, ds_user, source, request, arguments.allow)


def _print_config(config: RunConfig, ds_user: dict[str, Any], source: str) -> None:
    from megalr.config.loading import dump_config

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout
        from megalr.engine.build import check_run
        from megalr.engine.config import describe_deepspeed
        from megalr.models.build import describe_parameters, with_sizes

        stage, described = describe_deepspeed(config, ds_user, source)
        groups = check_run(config, stage)
    print(dump_config(with_sizes(config)) + describe_parameters(config), end="")
    for name, values in groups.items():
        print(f"# {name}: peak lr {values['lr']:g}, weight decay {values['weight_decay']:g}")
    print(described)
