"""The rules find what they are made to find; that the package keeps them is ``make lint``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests import rules
from tests.rules import Source

GOOD_ROOM = '"""Room.\n\nIn: a. Out: b. Must not know c.\n"""\n'
LONG = "def f():\n" + "    x = 1\n" * 61


@pytest.mark.parametrize(
    ("rule", "path", "text", "expected"),
    [
        (
            rules.deepspeed_outside_engine,
            "run/a.py",
            "import deepspeed.comm\n",
            "imports deepspeed",
        ),
        (rules.deepspeed_outside_engine, "run/a.py", "x = p.ds_tensor\n", "ds_tensor"),
        (rules.rooms_without_a_contract, "run/__init__.py", '"""In: a. Out: b."""\n', "not know"),
        (rules.sizes, "run/a.py", "x = 1\n" * 401, "401 lines"),
        (rules.sizes, "run/a.py", "x = 1\n" * 59, "59 lines"),
        (rules.sizes, "run/a.py", LONG, "f has 61 lines"),
        (rules.method_names, "run/a.py", 'if name == "cola":\n    pass\n', "names cola"),
        (rules.patches_without_facts, "engine/patch_a.py", "x = 1\n", "patch_a.py"),
    ],
)
def test_a_violation_is_named(
    rule: Callable[[list[Source]], Iterable[str]], path: str, text: str, expected: str
) -> None:
    assert expected in " ".join(rule([Source(path, text)]))


def test_what_is_allowed_is_not_named() -> None:
    """The same code in its own room, in docstrings and comments, within the limits."""
    allowed = [
        Source("run/__init__.py", GOOD_ROOM),
        Source("engine/a.py", "import deepspeed\nx = p.ds_tensor\n" + "y = 1\n" * 60),
        Source("run/a.py", '"""Of ds_tensor, import deepspeed."""\n' + "x = 1  # ds_tensor\n" * 60),
        Source("config/b.py", 'NAMES = ("cola", "lora")\n' * 60),
        Source("run/c.py", 'def f():\n    """cola"""\n' + "    x = 1\n" * 60),
    ]
    found = [
        line
        for rule in (
            rules.deepspeed_outside_engine,
            rules.rooms_without_a_contract,
            rules.sizes,
            rules.method_names,
            rules.patches_without_facts,
        )
        for line in rule(allowed)
    ]
    assert found == []


def test_one_public_name_in_two_files_is_named() -> None:
    twice = [Source("run/a.py", "class Manifest: ...\n"), Source("hf/a.py", "def f(): ...\n")]
    assert list(rules.names_with_two_meanings(twice)) == ["run/a.py and hf/a.py share a file name"]
    twice = [
        Source("run/a.py", "class Manifest: ...\n"),
        Source("hf/b.py", "class Manifest: ...\n"),
    ]
    (line,) = rules.names_with_two_meanings(twice)
    assert line.startswith("Manifest is defined in run/a.py and hf/b.py")
