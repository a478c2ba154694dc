"""Prose is taken from documentation strings and text files, once, in C4's format, reproducibly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from gather_docs import gather, is_prose, passages_of

from megalr.errors import UserError

SENTENCE = "This function explains what happens to the {} when another {} arrives in the meantime, "
PROSE = SENTENCE + "and why nobody should rely on the order in which those two things are done."


def prose(word: str) -> str:
    return PROSE.format(word, word)


def module(*words: str) -> str:
    functions = "".join(
        f'def f{number}():\n    """{prose(word)}\n\n    {prose(word * 2)}\n    """\n'
        for number, word in enumerate(words)
    )
    return f'"""{prose("module" + words[0])} {prose("again" + words[0])}"""\n{functions}'


def make_packages(root: Path) -> Path:
    names = [f"word{letter}{other}" for letter in "abcdefghijklmno" for other in "pqrstuvwxyz"]
    for number, name in enumerate(names):
        folder = root / f"package{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(module(name, name + "x", "shared"), encoding="utf-8")
    (root / "package0" / "guide.md").write_text(f"# Title\n\n{prose('guide')}\n\nshort\n")
    (root / "package0" / "LICENSE.txt").write_text(prose("licence"))
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "t.md").write_text(prose("hidden"))
    (root / "package0" / "broken.py").write_text('def f(:\n    """' + prose("broken") * 9 + '"""')
    (root / "package0" / "latin.md").write_bytes(b"caf\xe9 " * 99)
    (root / "package0" / "evil.py").write_text(
        module("evil", "evilx") + "raise SystemExit('files are parsed, never run')\n"
    )
    return root


def read(paths: tuple[str, ...]) -> list[dict[str, Any]]:
    lines = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += [json.loads(line) for line in file]
    return lines


def test_shards_are_c4_format_without_repeats_or_held_out_text(tmp_path: Path) -> None:
    found = gather([make_packages(tmp_path / "site")], tmp_path / "out", shards=3)
    train, validation = read(found.train_files), read(found.validation_files)
    assert len(found.train_files) == 3 and len(train) == found.train_documents
    assert len(validation) == found.validation_documents > 0
    assert sum(len(line["text"]) for line in train) == found.train_characters
    assert all(set(line) == {"text", "timestamp", "url", "source"} for line in train)
    assert {line["url"] for line in train}.isdisjoint(line["url"] for line in validation)
    passages = [p for line in train + validation for p in line["text"].split("\n\n")]
    assert sum(prose("shared") in p for p in passages) == 1
    assert len(set(passages)) == len(passages)
    text = "".join(passages)
    assert prose("guide") in text and prose("evil") in text and prose("moduleevil") in text
    for absent in ("licence", "hidden", "broken"):
        assert prose(absent) not in text


def test_same_files_give_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    site = make_packages(tmp_path / "site")
    gather([site], tmp_path / "one", workers=1)
    gather([site], tmp_path / "two", workers=2)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.gz"))
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "gathered.json").exists()


def test_docstrings_come_in_the_order_of_the_file_with_indentation_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    body = f'    """{prose("two")}\n\n    {prose("three")}\n        indented\n    """\n'
    body += f'    async def f(self):\n        """{prose("four")}"""\n'
    path.write_text(f'"""{prose("one")}"""\nclass A:\n{body}')
    assert passages_of(path) == [
        prose("one"),
        f"{prose('two')}\n\n{prose('three')}\n    indented",
        prose("four"),
    ]


def test_code_and_tables_are_no_prose() -> None:
    assert is_prose(prose("thing"))
    assert not is_prose("too short to be of any use")
    assert not is_prose("a = b[3] + {4: 5}; f(x, y) -> 7; " * 10)


def test_folders_that_give_nothing_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        gather([tmp_path / "missing"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no prose found below"):
        gather([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
