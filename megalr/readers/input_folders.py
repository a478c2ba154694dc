"""Folders as input: files of one kind, or a data set saved by ``datasets.save_to_disk``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalr.errors import UserError

SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", SAVED_STATE, SAVED_SPLITS)
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
NAMES_SHOWN = 5


def files_of_folder(folder: Path, kind_of: Callable[[Path], str | None]) -> list[Path]:
    """Input files of a folder and the folders below it, sorted.

    ``kind_of`` gives the kind of a file, None for one that is no input. Raises UserError unless
    all are of one kind and of one split (train, validation, test), because a wrong choice would
    not show.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = _json(folder / SAVED_SPLITS).get("splits")
        if not isinstance(names, list) or len(names) != 1:
            raise UserError(
                f"{folder}: holds the splits {names}; name one, for example {folder}/"
                f"{names[0] if isinstance(names, list) and names else 'train'}"
            )
        folder = folder / str(names[0])
    if (folder / SAVED_STATE).is_file():
        return _saved_files(folder)
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.name in DESCRIPTIONS or path.is_dir():
            continue
        if (kind := kind_of(path)) is not None:
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise UserError(f"{folder}: is a folder without a file of a known kind")
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        raise UserError(
            f"{folder}: is a folder with several kinds of files ({found}); give the files of one, "
            f"for example '{folder}/*{kinds[min(kinds)][0].suffix}'"
        )
    (files,) = kinds.values()
    splits = {split for file in files if (split := _split_of(file.relative_to(folder)))}
    if len(splits) > 1:
        raise UserError(
            f"{folder}: is a folder with files of several splits ({', '.join(sorted(splits))}); "
            f"give the files of one, for example '{folder}/*{min(splits)}*'"
        )
    return files


def _split_of(path: Path) -> str | None:
    """The split that the name of a file, or of a folder above it, begins with."""
    found = [match[1].lower() for part in path.parts if (match := _SPLIT_NAME.match(part))]
    return found[-1] if found else None


def _saved_files(folder: Path) -> list[Path]:
    """The ``.arrow`` files of a folder that ``datasets.save_to_disk`` wrote, in its order."""
    state = _json(folder / SAVED_STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: is saved with a selection of rows beside the data; apply it first "
            f"(flatten_indices) and save again"
        )
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        raise UserError(f"{folder / SAVED_STATE}: names no data files; save the data set again")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"{folder / SAVED_STATE}: names the data file {name!r}, which is not in the folder"
            )
    return [folder / str(name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content
