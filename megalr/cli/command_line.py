"""What all command lines share: spelling of options, overrides among other words, recipes by name.

Options are written with underscores; the form with dashes is accepted everywhere, and so are the
names that an option had before.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalr.cli.commands import COMMANDS
from megalr.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
FILES = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent
"""Where recipes/, ds_configs/ and launchers/ are: in the package; in a checkout beside it."""
LAUNCHERS = FILES / "launchers"
PACKAGED = {
    "recipe": ("recipes/*.yaml", "recipes/methods/*.yaml"),
    "DeepSpeed JSON": ("ds_configs/*.json",),
    "sweep": ("recipes/sweeps/*.yaml",),
}
"""Files that come with megalr and can be given by name, by kind."""
ENDINGS = (".yaml", ".yml", ".json")
DEFAULT_DEEPSPEED: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def new_parser(name: str, prog: str | None, details: str = "") -> argparse.ArgumentParser:
    """An empty parser for the command ``name``.

    Args:
        name: key of ``COMMANDS``.
        prog: as argparse takes it; None: the name of the file that was started.
        details: follows the summary in the help.
    """
    command = COMMANDS[name]
    width = min(shutil.get_terminal_size().columns, 100) - 2  # as argparse's own
    summary = textwrap.fill(f"{command.summary} {details}", width)
    parts = [summary, f"example:\n  {command.example}"]
    if command.program is not None:
        parts.append(f"In a checkout also: python {command.program}")
    return argparse.ArgumentParser(
        prog=prog,
        description="\n\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    renamed: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """Parse ``words`` (None: this process's own) with options and positional words in any order.

    Args:
        parser: knows the options by their names with underscores.
        words: a command line without the program's name.
        renamed: former name of an option to its present one.
    """
    words = sys.argv[1:] if words is None else words
    return parser.parse_intermixed_args(spelled(words, renamed or {}))


def spelled(words: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The words with every option under its present name, with underscores; none after ``--``."""
    end = words.index("--") if "--" in words else len(words)
    found = []
    for word in words[:end]:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            word = renamed.get(name, name) + equals + value
        found.append(word)
    return [*found, *words[end:]]


def without_option(words: Sequence[str], option: str) -> list[str]:
    """The words without this option and its one value."""
    found, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            found.append(word)
        skip = word == option
    return found


def add_gpus(parser: argparse.ArgumentParser, default: str) -> None:
    """``--gpus``: an int, how many; or a list of names as in CUDA_VISIBLE_DEVICES.

    A comma makes a list of a single name.
    """
    parser.add_argument(
        "--gpus",
        type=lambda text: int(text) if text.isdecimal() else text.strip(",").split(","),
        metavar="N|0,1,...",
        help=f"how many GPUs of this machine, or which; 1, is GPU 1 alone (default: {default})",
    )


def only_one(option: str, *given: Path | None) -> Path:
    """The one value of ``given`` that is not None, for ``option`` or its short form.

    Raises:
        UserError: none or several are.
    """
    values = [value for value in given if value is not None]
    if len(values) != 1:
        found = " and ".join(map(str, values)) or "not given"
        raise UserError(f"{option} is {found}: give it once")
    return values[0]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--deepspeed_config`` and overrides; read by :func:`parse_run`."""
    add = parser.add_argument
    add(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files of the run, or the name of a recipe (`megalr recipes`)",
    )
    add(
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed JSON, such as zero2 of `megalr recipes` (default: ZeRO stage 1)",
    )
    add("overrides", nargs="*", metavar="section.key=value", help="replace values of the files")


def parse_run(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    lists: Sequence[str] = ("config",),
    bare_config: bool = False,
) -> argparse.Namespace:
    """:func:`parse` for a parser with :func:`add_run_options`.

    argparse takes overrides that stand right after ``--config FILE`` for more files. They are moved
    to ``overrides``, which keep the order of the command line, since the last of a key wins.
    Files contain no "=", except for a file in a folder such as ``lr=0.1/``.

    Args:
        parser: has further options, maybe.
        words: as for :func:`parse`.
        lists: options with several values, behind which overrides may stand.
        bare_config: whether files that stand alone count as values of ``--config``.
    """
    words = sys.argv[1:] if words is None else words
    arguments = parse(parser, words)
    for name in lists:
        values = getattr(arguments, name)
        setattr(arguments, name, [word for word in values if not _is_override(word)])
        arguments.overrides += [word for word in values if _is_override(word)]
    if bare_config:
        arguments.config += [word for word in arguments.overrides if not _is_override(word)]
        arguments.overrides = [word for word in arguments.overrides if _is_override(word)]
    arguments.overrides = in_order(arguments.overrides, words)
    return arguments


def in_order(overrides: Iterable[str], words: Sequence[str]) -> list[str]:
    """The overrides in the order of the command line ``words``, since the last of a key wins."""
    last = {word: place for place, word in enumerate(words)}
    return sorted(overrides, key=lambda word: last.get(word, 0))


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).is_file()


def config_files(arguments: argparse.Namespace) -> list[Path]:
    """The files of ``--config``, recipes found by name.

    Raises:
        UserError: there is none, or a name is unknown.
    """
    if not arguments.config:
        raise UserError("--config is missing: give YAML files or a recipe (`megalr recipes`)")
    return [find_file(given) for given in arguments.config]


def deepspeed_config(given: str | None) -> tuple[dict[str, Any], str]:
    """The DeepSpeed JSON of ``--deepspeed_config``, or the default; and its name in messages.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    if given is None:
        return DEFAULT_DEEPSPEED, "default DeepSpeed config"
    from megalr.engine.config import read_deepspeed_json

    path = find_file(given, "DeepSpeed JSON")
    return read_deepspeed_json(path), str(path)


def packaged_names(kind: str) -> dict[str, Path]:
    """The files of a key of ``PACKAGED`` by their names without ending, in alphabetical order."""
    files = [path for place in PACKAGED[kind] for path in FILES.glob(place)]
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def find_file(given: str, kind: str = "recipe") -> Path:
    """The file ``given``, or the one of that name that comes with megalr.

    A word without folder and ending, such as ``qwen3_0.6b``, names one of megalr's files unless
    such a file exists.

    Args:
        given: value of ``--config`` or ``--deepspeed_config``.
        kind: key of ``PACKAGED``.

    Raises:
        UserError: nothing has that name; shows the nearest.
    """
    path = Path(given)
    if path.suffix in ENDINGS or path.name != given or path.is_file():
        return path
    names = packaged_names(kind)
    if given not in names:
        raise UserError(
            f"{given}: neither a file nor a {kind} that comes with "
            f"megalr{did_you_mean(given, names)} (`megalr recipes` lists all)"
        )
    return names[given]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """ "; did you mean X?" with the candidate most similar to ``word``; "" if none is."""
    from megalr.config.problems import nearest  # pydantic takes half a second

    close = nearest(word, candidates)
    return f"; did you mean {close}?" if close else ""
