"""Collect English prose from installed Python packages as C4-format shards.

python tools/gather_docs.py --output quickstart/text

A source of real text for a machine without a data set: documentation strings and text files are
parsed, nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megalr.cli.command_line import parse
from megalr.errors import UserError, exit_cleanly

TIMESTAMP = "1970-01-01T00:00:00Z"
"""C4's ``timestamp`` field; one fixed value, so that the same packages give the same bytes."""
SUFFIXES = (".py", ".md", ".rst", ".txt")
LEGAL = re.compile(r"licen[cs]e|copying|notice|authors|credits|changelog|changes", re.IGNORECASE)
VALIDATION_SHARE = 50
"""One file of this number is held out, with all its passages."""


@dataclass(frozen=True)
class Gathered:
    """What was written: documents and characters per split, and the files, in ``folder``."""

    folder: str
    train_documents: int
    train_characters: int
    validation_documents: int
    validation_characters: int
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def gather(
    roots: Sequence[Path],
    output: Path,
    *,
    shards: int = 4,
    workers: int = 1,
    document_characters: int = 3000,
    max_characters: int | None = None,
) -> Gathered:
    """Write ``train-*.json.gz`` and one ``validation-*.json.gz`` into ``output``.

    Args:
        roots: Folders that are searched for ``.py``, ``.md``, ``.rst`` and ``.txt`` files.
        shards: Number of training shards.
        workers: Processes that parse; the result does not depend on it.
        document_characters: Passages of a file are joined until a document is this long.
        max_characters: Stop after this much training text; None = take everything.

    Every line of a shard is ``{"text", "timestamp", "url", "source"}`` as in C4. A passage that
    occurs twice anywhere is kept once, so no validation passage is in the training text.
    Order and bytes depend on the files found only. ``gathered.json`` is written last.

    Raises:
        UserError: nothing that reads like prose was found, or ``output`` cannot be written.
    """
    files = list(_files(roots))
    passages = _in_order(files, workers)
    documents: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    sizes = dict.fromkeys(documents, 0)
    seen: set[bytes] = set()
    for (_, name), found in zip(files, passages, strict=True):
        split = "validation" if _held_out(name) else "train"
        for text in _documents(found, seen, document_characters):
            documents[split].append((name, text))
            sizes[split] += len(text)
        if max_characters is not None and sizes["train"] >= max_characters:
            break
    if not documents["train"] or not documents["validation"]:
        raise UserError(f"no prose found below {', '.join(map(str, roots))}: name other folders")
    try:
        output.mkdir(parents=True, exist_ok=True)
        written = {
            split: _write(output, split, shards if split == "train" else 1, documents[split])
            for split in documents
        }
        summary = Gathered(
            str(output),
            len(documents["train"]),
            sizes["train"],
            len(documents["validation"]),
            sizes["validation"],
            written["train"],
            written["validation"],
        )
        _replace(output / "gathered.json", json.dumps(asdict(summary), indent=2).encode())
    except OSError as error:
        raise UserError(f"{output}: cannot write: {error.strerror}") from error
    return summary


def _files(roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """(file, name relative to its root), sorted; no tests, no vendored copies, no licences."""
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(
                name
                for name in subfolders
                if name not in ("tests", "test", "_vendor", "__pycache__")
                and not name.endswith((".dist-info", ".egg-info"))
            )
            for name in sorted(names):
                if name.endswith(SUFFIXES) and not LEGAL.search(name):
                    path = Path(folder, name)
                    yield path, path.relative_to(root).as_posix()


def _in_order(files: list[tuple[Path, str]], workers: int) -> Iterator[list[str]]:
    paths = [path for path, _ in files]
    if workers <= 1:
        yield from map(passages_of, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(passages_of, paths, chunksize=32)


def passages_of(path: Path) -> list[str]:
    """Documentation strings of a Python file, or paragraphs of a text file, that read like prose.

    Files that cannot be read or parsed give nothing, nor do Python files that are mostly code:
    parsing takes nearly all of the time, and those hold a fifth of the prose in half of the bytes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            quoted = sum(map(len, _QUOTED.findall(text)))
            if quoted < 500 or quoted < 0.2 * len(text):
                return []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's code
                found = list(_docstrings(ast.parse(text)))
        else:
            found = re.split(r"\n\s*\n", text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [passage for passage in map(_tidy, found) if is_prose(passage)]


_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(node: _Documented) -> Iterator[str]:
    """Documentation strings of a module, its classes and functions, in the order of the file."""
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _tidy(passage: str) -> str:
    return textwrap.dedent(passage).strip().replace("\r\n", "\n")


def is_prose(passage: str) -> bool:
    """Whether a passage has at least 20 words and is mostly letters and spaces."""
    if len(passage.split()) < 20:
        return False
    return len(re.findall(r"[^\W\d_]|\s", passage)) >= 0.8 * len(passage)


def _held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % VALIDATION_SHARE == 0


def _documents(passages: list[str], seen: set[bytes], length: int) -> Iterator[str]:
    """New passages of one file, joined to documents of at least ``length`` characters."""
    pending: list[str] = []
    size = 0
    for passage in passages:
        digest = hashlib.sha256(" ".join(passage.split()).encode()).digest()[:12]
        if digest in seen:
            continue
        seen.add(digest)
        pending.append(passage)
        size += len(passage)
        if size >= length:
            yield "\n\n".join(pending)
            pending, size = [], 0
    if pending:
        yield "\n\n".join(pending)


def _write(
    output: Path, split: str, shards: int, documents: list[tuple[str, str]]
) -> tuple[str, ...]:
    """Deal the documents out to the shards in turn; returns the paths."""
    paths = []
    for shard in range(shards):
        lines = [
            json.dumps(
                {
                    "text": text,
                    "timestamp": TIMESTAMP,
                    "url": f"package:{name}",
                    "source": name.split("/", 1)[0],
                },
                ensure_ascii=False,
            )
            for name, text in documents[shard::shards]
        ]
        path = output / f"{split}-{shard:05d}-of-{shards:05d}.json.gz"
        _replace(path, gzip.compress(("\n".join(lines) + "\n").encode(), 6, mtime=0))
        paths.append(str(path))
    return tuple(paths)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def main() -> None:
    """Parse the command line, gather, say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--packages",
        type=Path,
        nargs="+",
        default=[Path(sysconfig.get_path("purelib"))],
        help="folders to search (default: the packages of this interpreter)",
    )
    parser.add_argument("--shards", type=int, default=4, help="training shards (default 4)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parse(parser, None)
    for name in ("shards", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    found = gather(
        arguments.packages, arguments.output, shards=arguments.shards, workers=arguments.workers
    )
    print(
        f"{found.train_documents} documents ({found.train_characters / 1e6:.1f} M characters) for "
        f"training, {found.validation_documents} ({found.validation_characters / 1e6:.1f} M) held "
        f"out, in {found.folder}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
