"""``megalr keys`` and ``megalr recipes``: what a run can be given, and what comes with megalr."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.cli.command_line import (
    PACKAGED,
    did_you_mean,
    new_parser,
    packaged_names,
    parse,
)
from megalr.errors import UserError

if TYPE_CHECKING:
    from megalr.config.key_tables import KeyRow, KeyTable


def keys_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr keys``."""
    parser = new_parser("keys", prog, "Without a place it lists the sections.")
    parser.add_argument(
        "place",
        nargs="?",
        metavar="SECTION[.KEY]",
        help="a section, a key, or a kind such as optimizer.name=muon",
    )
    return parser


def keys_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print sections, or the keys of a place."""
    place = parse(keys_parser(prog), words).place
    from megalr.config.key_tables import key_tables

    tables = key_tables()
    print("\n".join(_sections(tables) if place is None else _explained(place, tables)))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _wrapped(text: str, indent: int, hanging: int) -> str:
    """The text in lines of the terminal's width; keys and paths are not divided."""
    return textwrap.fill(
        text,
        _width(),
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _sections(tables: list[KeyTable]) -> list[str]:
    """A line for every section, its kinds or what it is for; the mappings inside sections."""
    kinds: dict[str, list[KeyTable]] = {}
    for table in tables:
        kinds.setdefault(table.place, []).append(table)
    lines = []
    for place, found in kinds.items():
        if "." not in place:
            names = ", ".join(table.name for table in found)
            text = f"{place}.name: {names}" if names else found[0].meaning.split(". ")[0]
            lines.append(_wrapped(f"{place:<12} {text}", 0, 13))
    inside = ", ".join(place for place in kinds if "." in place)
    lines += ["", _wrapped(f"Keys with keys of their own: {inside}", 0, 4)]
    return [*lines, "", "megalr keys SECTION explains the keys of a section."]


def _explained(place: str, tables: list[KeyTable]) -> list[str]:
    """The keys of a section, of a kind of it or of a mapping; or one key."""
    section, _, name = place.partition(".name=")
    found = [table for table in tables if table.place == section and name in ("", table.name)]
    if found:
        return _listed(found)
    rows: dict[KeyRow, list[str]] = {}
    for table in tables:
        for row in table.rows:
            if row.key == place:
                rows.setdefault(row, []).append(table.name)
    if rows:
        lines = []
        for row, names in rows.items():
            if len(rows) > 1:
                lines.append(f"with the name {', '.join(names)}:")
            lines += _row(row)
        return lines
    known = {table.place for table in tables} | {row.key for table in tables for row in table.rows}
    known |= {f"{table.place}.name={table.name}" for table in tables if table.name}
    raise UserError(
        f"no section and no key is called {place!r}{did_you_mean(place, known)} "
        "(`megalr keys` lists the sections)"
    )


def _listed(tables: list[KeyTable]) -> list[str]:
    """The rows of one table; of several kinds first what they have in common."""
    if len(tables) == 1:
        return [_wrapped(tables[0].meaning, 0, 0), *_rows(tables[0].rows)]
    common = [row for row in tables[0].rows if all(row in table.rows for table in tables)]
    names = ", ".join(table.name for table in tables)
    lines = [_wrapped(f"{tables[0].place}.name: {names}", 0, 4)]
    lines += ["", "with every name:", *_rows(common)] if common else []
    for table in tables:
        rest = [r for r in table.rows if r not in common and r.key != f"{table.place}.name"]
        lines += ["", _wrapped(f"{table.place}.name={table.name}: {table.meaning}", 0, 4)]
        lines += _rows(rest)
    return lines


def _rows(rows: Sequence[KeyRow]) -> list[str]:
    return [line for row in rows for line in _row(row)]


def _row(row: KeyRow) -> list[str]:
    """Key, type and default; below them the meaning, and an example if it says more."""
    facts = f"{row.type.replace('`', '')}; default {row.default}"
    if row.default is None:
        facts = f"{row.type.replace('`', '')}; required"
    elif row.default == "":
        facts = f"keys of its own: megalr keys {row.key}"
    lines = [_wrapped(f"{row.key}  ({facts})", 2, 8)]
    example = f" Example: {row.example}" if row.example not in (None, row.default) else ""
    return [*lines, *([_wrapped(row.meaning + example, 6, 6)] if row.meaning or example else [])]


def recipes_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``megalr recipes``."""
    parser = new_parser("recipes", prog, "Given a name it prints that file.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="for example llama_60m")
    return parser


def recipes_command(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the names, or one file."""
    name = parse(recipes_parser(prog), words).name
    if name is None:
        for kind in PACKAGED:
            if names := packaged_names(kind):
                print(_wrapped(f"{kind}: {', '.join(names)}", 0, 4))
        return
    files: dict[str, Path] = {}
    for kind in reversed(PACKAGED):
        files |= packaged_names(kind)
    if name not in files:
        raise UserError(f"no recipe is called {name!r}{did_you_mean(name, files)}")
    print(files[name].read_text(encoding="utf-8"), end="")
