"""``megalr ranks``: move rank between the matrices of a run, for a run that starts from it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalr.cli.command_line import new_parser, only_one, parse
from megalr.errors import UserError


def ranks_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr ranks``."""
    parser = new_parser(
        "ranks",
        prog,
        "Without --output nothing is written. The new run: run.fork_from=OUTPUT "
        "run.fork_state=weights and the printed method.ranks.",
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="RUN", help="the same as --run RUN")
    add("--run", type=Path, help="folder of a run with factors")
    add("--tag", help="checkpoint, for example update_1000 (default: the newest)")
    add("--output", type=Path, help="folder to write the weights at these ranks to: new or empty")
    add(
        "--share",
        type=float,
        default=1.0,
        help="numbers in all factors, relative to the run's (default: %(default)s)",
    )
    add("--multiple", type=int, default=8, help="ranks are multiples of it (default: %(default)s)")
    add(
        "--growth",
        type=float,
        default=2.0,
        help="factor by which a rank may grow at most (default: %(default)s)",
    )
    return parser


def ranks_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Measure, choose, print a table and the ranks; write the weights if asked to."""
    arguments = parse(ranks_parser(prog), words)
    run = only_one("--run", arguments.run, arguments.folder)
    if not 0 < arguments.share < float("inf"):
        raise UserError(f"--share {arguments.share}: must be above 0")
    for name in ("multiple", "growth"):
        value = getattr(arguments, name)
        if not 1 <= value < float("inf"):
            raise UserError(f"--{name} {value}: must be 1 or more")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and warn
    from tqdm import tqdm

    from megalr.checkpoint.choose_ranks import as_entries, choose_ranks
    from megalr.checkpoint.other_ranks import measured_spectra, write_other_ranks
    from megalr.hf.init_from_pretrained import read_supports, write_supports
    from megalr.hf.trained_run import open_verified, run_config
    from megalr.hf.write import check_output

    if arguments.output is not None:
        check_output(arguments.output)
    checkpoint = open_verified(run, arguments.tag)
    config = run_config(checkpoint)
    spectra = measured_spectra(checkpoint)
    present = sum(one.rank * sum(one.size) for one in spectra)
    budget = int(arguments.share * present)
    ranks = choose_ranks(spectra, budget, arguments.multiple, arguments.growth)
    _print_table(spectra, ranks)
    after = sum(ranks[one.name] * sum(one.size) for one in spectra)
    print(f"numbers in the factors: {after:,} instead of {present:,}")
    method: Any = config.method
    entries = as_entries(ranks, method.rank)
    listed = ", ".join(f"{name}: {rank}" for name, rank in entries.items())
    print(f"method.ranks={{{listed}}}")
    if arguments.output is None:
        return
    with tqdm(unit="parameter", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = write_other_ranks(checkpoint, ranks, arguments.output, show)
    write_supports(arguments.output, read_supports(config, run))
    lines = "".join(f"    {name}: {rank}\n" for name, rank in entries.items())
    text = f"method:\n  ranks:\n{lines}" if entries else "method:\n  ranks: null\n"
    (arguments.output / "ranks.yaml").write_text(text, encoding="utf-8")
    print(f"written: {folder}, {arguments.output / 'ranks.yaml'}")


def _print_table(spectra: Sequence[Any], ranks: Mapping[str, int]) -> None:
    """Ranks by projection: range and mean over the layers, present and chosen."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for one in spectra:
        found = kinds.setdefault(one.name.rsplit(".", 1)[-1], [])
        found.append((one.rank, ranks[one.name]))
    for kind, pairs in kinds.items():
        cells = [
            f"{min(column)} to {max(column)} (mean {sum(column) / len(column):.1f})"
            for column in zip(*pairs, strict=True)
        ]
        print(f"{kind:<6}rank {cells[0]}  ->  {cells[1]}")
