"""Pretrain a model: ``deepspeed launchers/pretrain.py --config recipes/llama_60m.yaml ...``.

Continue a run: ``deepspeed launchers/pretrain.py --resume runs/llama_60m``.
Also started by torchrun, by mpirun, or by plain python for one process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.distributed.signals import StopRequest
from megalr.errors import (
    LOCAL_RANK_VARIABLES,
    AgreedError,
    UserError,
    exit_cleanly,
    launched_number,
)

if TYPE_CHECKING:
    from megalr.config.schema import RunConfig

DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 1}}


def parse_arguments() -> argparse.Namespace:
    """The command line; positional arguments are overrides ``section.key=value``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", metavar="FILE", help="one or several YAML files")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="folder of a run to continue with its own configuration and DeepSpeed JSON",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        help="DeepSpeed JSON, see ds_configs/ (default: the run's, else ZeRO stage 1)",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved run and stop"
    )
    parser.add_argument(
        "--allow",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys that may differ from the run in run.dir (docs/checkpoints.md)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) == (arguments.resume is None):
        parser.error("give either --config or --resume")
    arguments.config = arguments.config or []
    # argparse takes overrides right after --config or --allow for values of these options. Values
    # contain no "=", except for a file in a folder such as lr=0.1/.
    files = [text for text in arguments.config if "=" not in text or Path(text).is_file()]
    arguments.overrides += [text for text in arguments.config if text not in files]
    arguments.config = [Path(text) for text in files]
    arguments.overrides += [key for key in arguments.allow if "=" in key]
    arguments.allow = [key for key in arguments.allow if "=" not in key]
    return arguments


def read_run(arguments: argparse.Namespace) -> tuple[RunConfig, dict[str, Any], str]:
    """The run's configuration, the user's DeepSpeed JSON, and the name of that in messages.

    Raises:
        UserError: one line per problem.
    """
    from megalr.config.loading import load_run_config
    from megalr.config.resuming import check_allowed
    from megalr.engine.config import read_deepspeed_json, reopened
    from megalr.models.config import PRESETS
    from megalr.run.folder import DS_CONFIG, stored_config

    run = arguments.resume
    if run is None:
        config = load_run_config(arguments.config, arguments.overrides, presets=PRESETS)
    else:
        config = stored_config(run, arguments.overrides, PRESETS)
    check_allowed(arguments.allow)
    if arguments.deepspeed_config is not None:
        path = arguments.deepspeed_config
        return config, read_deepspeed_json(path), str(path)
    if run is not None:
        return config, reopened(read_deepspeed_json(run / DS_CONFIG)), str(run / DS_CONFIG)
    return config, DEFAULT_DEEPSPEED, "default DeepSpeed config"


def main() -> int:
    """Parse, then run; returns 0 if finished, 75 if stopped on request (docs/health.md)."""
    arguments = parse_arguments()
    request = StopRequest()
    if not arguments.print_config:
        request.listen()
    # Imported after listen() because they take a second.
    from megalr.config.loading import dump_config

    try:  # Every rank reads the same files, so every rank finds the same mistakes.
        config, ds_user, source = read_run(arguments)
    except UserError as error:
        if launched_number(LOCAL_RANK_VARIABLES) == 0:
            raise
        raise AgreedError(str(error)) from error
    if arguments.print_config:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout
            from megalr.engine.build import check_run
            from megalr.engine.config import describe_deepspeed

            stage, described = describe_deepspeed(config, ds_user, source)
            groups = check_run(config, stage)
        print(dump_config(config), end="")
        for name, values in groups.items():
            print(f"# {name}: peak lr {values['lr']:g}, weight decay {values['weight_decay']:g}")
        print(described)
        return 0
    from megalr.distributed.peer_errors import name_lost_peers
    from megalr.training.pretrain import pretrain

    with name_lost_peers(config.run.timeout_seconds):
        return pretrain(config, ds_user, source, request, arguments.allow)


if __name__ == "__main__":
    exit_cleanly(main)
