"""Time, memory and communication of an update on 8 to 4,096 GPUs, predicted, and how far to trust.

    python benchmarks/scaling_model.py --check                 predictions beside measurements
    python benchmarks/scaling_model.py --output benchmarks/lab   scaling.md's tables, scaling.svg

Three numbers of the GPU are fitted to the recorded runs of one GPU in ``benchmarks/results``; what
was recorded on several GPUs is compared and not fitted. The cluster's links are options.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from scaling.checks import check
from scaling.choices import sweep
from scaling.points import fit, recorded
from scaling.report import draw, tables, write_between

from megalr.errors import exit_cleanly
from megalr.estimate.cluster import H200
from megalr.estimate.memory import GIB


def main() -> None:
    """Check, or predict and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--check", action="store_true", help="compare with what is recorded, and stop")
    add("--across", type=float, default=H200.across / 1e9, help="GB/s of a GPU between nodes")
    add("--inside", type=float, default=H200.inside / 1e9, help="GB/s of a GPU inside a node")
    add("--memory", type=float, default=H200.memory / GIB, help="GiB of a GPU")
    add("--output", type=Path, help="folder with scaling.md, whose tables are replaced")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    if arguments.check:
        check()
        return
    cluster = replace(
        H200,
        across=arguments.across * 1e9,
        inside=arguments.inside * 1e9,
        memory=arguments.memory * GIB,
    )
    choices = sweep(fit([run for run in recorded() if run.job.gpus == 1]), cluster)
    text = tables(choices)
    print(text)
    if arguments.output is not None:
        write_between(arguments.output / "scaling.md", text)
        draw(choices, arguments.output / "scaling.svg")


if __name__ == "__main__":
    exit_cleanly(main)
