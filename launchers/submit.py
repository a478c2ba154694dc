"""Submit a recipe to SLURM: ``python launchers/submit.py RECIPE --nodes 4 --gpus 8 --time 1-00``.

Checks the run, fills the header of launchers/slurm/pretrain.sbatch and gives it to sbatch;
``--dry-run`` prints it instead.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

from megalr.config.loading import load_run_config
from megalr.distributed.slurm_script import check_time, fill_header, submit_script
from megalr.engine.config import read_deepspeed_json, resolve_deepspeed_config
from megalr.errors import UserError, exit_cleanly

TEMPLATE = Path(__file__).parent / "slurm" / "pretrain.sbatch"
DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 1}}
OWN_NAMES = {"job-name": "name", "output": "log"}
"""Options of this program that have another name in SLURM."""


def parse_arguments() -> argparse.Namespace:
    """The command line; positional arguments are overrides ``section.key=value``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="YAML file of the run")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs, and ranks, of each node")
    parser.add_argument("--time", required=True, help="time limit of one start, D-HH:MM:SS")
    parser.add_argument("--cpus", type=int, help="processor cores of each rank (default: header's)")
    parser.add_argument("--deepspeed_config", type=Path, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--partition", help="partition (default: the cluster's)")
    parser.add_argument("--account", help="account that is charged (default: yours)")
    parser.add_argument("--name", help="name of the job (default: the recipe's)")
    parser.add_argument("--log", help="the job's log (default: the header's)")
    parser.add_argument("--launch", choices=["srun", "torchrun"], default="srun")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    """Check, fill, submit or print."""
    arguments = parse_arguments()
    _check_options(arguments)
    script = fill(TEMPLATE.read_text(encoding="utf-8"), arguments)
    with contextlib.redirect_stdout(sys.stderr):  # importing DeepSpeed prints
        _check_run(arguments)
    if arguments.dry_run:
        print(script, end="")
        return
    print(submit_script(script), end="")


def fill(template: str, arguments: argparse.Namespace) -> str:
    """The batch script with this header and this run.

    Raises:
        UserError: a value of the header is not one word, or an argument is not UTF-8.
    """
    name = arguments.name
    if name is None:
        name = re.sub(r"[^\w.+-]+", "_", arguments.recipe.stem)
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
    run = ["--config", str(arguments.recipe)]
    if arguments.deepspeed_config is not None:
        run += ["--deepspeed_config", str(arguments.deepspeed_config)]
    run += arguments.overrides
    command = [f"set -- {shlex.join(run)}", f"LAUNCH={shlex.quote(arguments.launch)}"]
    return fill_header(template, header, command, OWN_NAMES)


def _check_options(arguments: argparse.Namespace) -> None:
    for name in ("nodes", "gpus", "cpus"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    check_time(arguments.time)


def _check_run(arguments: argparse.Namespace) -> None:
    """Refuse a run that would fail after hours in the queue."""
    from megalr.models.config import PRESETS

    config = load_run_config([arguments.recipe], arguments.overrides, presets=PRESETS)
    ds_user, source = DEFAULT_DEEPSPEED, "default DeepSpeed config"
    if arguments.deepspeed_config is not None:
        ds_user = read_deepspeed_json(arguments.deepspeed_config)
        source = str(arguments.deepspeed_config)
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


if __name__ == "__main__":
    exit_cleanly(main)
