"""The documentation against the code: links, keys, command lines, recorded numbers, style."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import throughput

from megalr.cli.command_line import find_file
from megalr.cli.commands import COMMANDS
from megalr.config import load_run_config
from megalr.config.methods import MethodConfig
from megalr.config.optimizers import OptimizerConfig
from megalr.config.problems import known_keys
from megalr.config.schema import RunConfig
from megalr.models.config import PRESETS

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
USER_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *METHOD_PAGES, *TUTORIALS]
DEVELOPER_PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "dev").glob("*.md"))]
LAB = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "benchmarks").glob("lab/*.md"))]
PAGES = [*USER_PAGES, *DEVELOPER_PAGES, *LAB]
PROGRAMS = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("tools", "launchers", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
}
SCRIPTS = {
    "launchers/mpi/pretrain.sh": "launchers/pretrain.py",
    "launchers/slurm/pretrain.sbatch": "launchers/pretrain.py",
    "launchers/slurm/preprocess.sbatch": "tools/preprocess_c4.py",
}
"""Scripts that hand their arguments on to a program."""
STARTS_RUNS = (
    *("launchers/pretrain.py", "launchers/submit.py", "tools/estimate_memory.py"),
    *("megalr train", "megalr submit", "megalr memory"),
)
NO_KEYS = {
    "checkpoint.writer",  # DeepSpeed's
    "checkpoint.tag_validation",
    "train.updatess",  # a mistake that is shown
}
MOST_WORDS = 1300
"""Of a user page, tables included, code not: about five minutes."""
REFERENCE = {"docs/config.md": "every key"} | {
    page.relative_to(ROOT).as_posix(): "algebra of every method, looked up by its name"
    for page in METHOD_PAGES
}
"""Pages in which one looks something up, with what it is."""
LONGER = {
    "docs/cluster.md": 1500,
    "docs/data.md": 1800,
    "docs/huggingface.md": 1700,
    "docs/restarts.md": 2000,
}
"""User pages that are too long still, and the length that they may not exceed."""
a_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
a_user_page = pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
LABEL = re.compile(r"\bG\d{1,2}\b")
"""A machine of benchmarks/lab/machines.md."""
COMMIT = re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b")
STYLE = re.compile(
    r"\b(anew|for ever|in silence|told|hear[sd]? of|speaks|left out|stands? still|so many"
    r"|of our own|is none of|the latter tells)\b"
    r"|\b(tokens|numbers?|bytes|bits|samples|sequences|documents|elements|FLOPs?|[GMkK]i?B|lines?"
    r"|scalars?|milliseconds) an? (?!few\b|lot\b)\w+",
    re.IGNORECASE,
)
"""Phrases of which plain English has better ones ("tokens per second", not "tokens a second")."""


def anchors(page: Path) -> set[str]:
    """What ``#...`` may name in a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@a_page
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    folders = "tests|megalr|benchmarks|recipes|ds_configs|launchers|tools|docs"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*)", text):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_readme_leads_to_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for page in (*(ROOT / "docs").glob("*.md"), *TUTORIALS, *DEVELOPER_PAGES):
        assert f"]({page.relative_to(ROOT).as_posix()})" in text
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for page in METHOD_PAGES:
        assert f"](methods/{page.name}#" in methods
    measurements, *lab = LAB
    for page in lab:
        assert f"](lab/{page.name})" in measurements.read_text(encoding="utf-8")


def test_names_of_developer_pages_are_in_the_files_beside_them() -> None:
    """ "`name` (`file.py`)", or "`Class.name` (`file.py`)"."""
    found = 0
    for page in DEVELOPER_PAGES:
        text = page.read_text(encoding="utf-8")
        for name, file in re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", text):
            nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            kinds = (ast.FunctionDef, ast.ClassDef)
            defined = {node.name for node in nodes if isinstance(node, kinds)}
            assert set(name.split(".")) <= defined, f"{page.name}: {name} in {file}"
            found += 1
    assert found >= 40


def test_every_room_has_a_row_in_the_architecture() -> None:
    text = (ROOT / "docs" / "dev" / "architecture.md").read_text(encoding="utf-8")
    rooms = {f"megalr/{path.parent.name}" for path in ROOT.glob("megalr/*/__init__.py")}
    section = text.split("## Rooms\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(megalr/\w+)` \|", section, re.MULTILINE)) == rooms


@pytest.mark.parametrize("page, lines", [("README.md", 120), ("docs/performance.md", 150)])
def test_pages_that_are_read_first_stay_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= lines


def test_user_pages_are_read_in_five_minutes() -> None:
    for page in USER_PAGES:
        name = page.relative_to(ROOT).as_posix()
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        words = sum(bool(re.search(r"\w", word)) for word in text.split())
        if name not in REFERENCE:
            assert words <= LONGER.get(name, MOST_WORDS), (name, words)
        assert name not in LONGER or words > MOST_WORDS, f"{name} is short enough now"


def test_every_method_and_optimizer_has_a_row_that_leads_to_its_algebra() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\]\((methods/\w+\.md#\w+)\) \|", text, re.MULTILINE))
    for section in (MethodConfig, OptimizerConfig):
        for kind in get_args(get_args(section)[0]):
            name = kind.model_fields["name"].default
            assert rows.pop(name).endswith(f"#{name}")
    assert not rows


@a_user_page
def test_user_pages_name_no_machine_and_no_commit(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not LABEL.findall(text)
    assert not COMMIT.findall(text)


@a_page
def test_pages_are_plain_english(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("first_batch_left_out", "")
    assert [match[0] for match in STYLE.finditer(text)] == []


@a_page
def test_dotted_words_are_keys_of_a_run(page: Path) -> None:
    keys = {*known_keys(RunConfig), *NO_KEYS}
    sections = "|".join(RunConfig.model_fields)
    text = re.sub(r"^```python\n.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    found = re.findall(rf"(?<![\w/.\-])(?:{sections})\.[a-z]\w*", text)
    found = [word for word in found if not word.endswith((".md", ".safetensors"))]
    assert not set(found) - keys


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(program, words behind it) of every command line of a page that starts one of ours."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in lines:
        for name in (*SCRIPTS, *PROGRAMS):
            before, found, behind = line.partition(name)
            if found and not before.endswith("/"):
                yield SCRIPTS.get(name, name), _words(behind)
                break
        else:
            called = re.match(r"(?:\S+/)?megalr (\w+)(?!\S)(.*)", line)
            if called:
                yield f"megalr {called[1]}", _words(called[2])


def _words(line: str) -> list[str]:
    return [word.strip("[]") for word in shlex.split(re.sub(r"\s#.*", "", line))]


def test_commands_are_found() -> None:
    """So that the tests below look at something."""
    assert len({program for program, _ in commands(PAGES[0])}) >= 8
    assert sum(len(list(commands(page))) for page in PAGES) >= 60


PARSERS = {
    name: command.parser
    for command in COMMANDS.values()
    for name in (f"megalr {command.name}", command.program)
    if name is not None
}


def options(program: str) -> set[str]:
    """Every ``--option`` of a command, or that a program's source adds to its parser."""
    if program in PARSERS:
        return set(PARSERS[program]()._option_string_actions)
    calls = [n for n in ast.walk(ast.parse(PROGRAMS[program].read_text())) if type(n) is ast.Call]
    first = [call.args[0] for call in calls if call.args]
    words = {word.value for word in first if isinstance(word, ast.Constant)}
    return {word for word in words if isinstance(word, str) and word.startswith("--")}


@a_page
def test_command_lines_have_options_that_exist_and_describe_runs_that_load(page: Path) -> None:
    for program, words in commands(page):
        given = {word for word in words if word.startswith("--") and len(word) > 2}
        assert not given - options(program), (program, words)
        recipes = [ROOT / word for word in words if word.startswith("recipes/")]
        recipes += [find_file(word) for word in words if word.startswith("llama_")]
        if program in STARTS_RUNS and recipes:
            changes = [word for word in words if re.match(r"[a-z]+\.\w+=", word)]
            load_run_config(recipes, changes, presets=PRESETS)


def test_examples_of_the_command_are_checked_like_those_of_the_pages() -> None:
    for command in COMMANDS.values():
        called, name, *words = shlex.split(command.example)
        assert (called, name) == ("megalr", command.name)
        given = {word for word in words if word.startswith("--")}
        assert given <= options(f"megalr {name}"), command.example


def test_cases_of_benchmarks_exist() -> None:
    cases = throughput.CASES
    named = 0
    for page in PAGES:
        for _, words in commands(page):
            behind = words[words.index("--cases") + 1 :] if "--cases" in words else []
            for word in behind:
                if word.startswith("--"):
                    break
                assert word in cases or word in ("CASE", "..."), (page.name, word)
                named += word in cases
    assert named > 10


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table rows below a heading, up to the next of its level, that give a speed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    level = heading.partition(" ")[0]
    section = text[text.index(f"\n{heading}\n") + 1 :]
    section = re.split(rf"\n#{{1,{len(level)}}} ", section)[0]
    found = [[c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines() if line]
    return [cells for cells in found if any(re.fullmatch(r"\d[\d,]*,\d{3}", c) for c in cells)]


def recorded() -> dict[str, dict[str, Any]]:
    """Recorded runs of benchmarks/throughput.py by their speed as the pages write it."""
    files = (ROOT / "benchmarks" / "results").glob("*gpu.json")
    rows = [row for file in files for row in json.loads(file.read_text())]
    return {f"{row['tokens_per_second']:,}": row for row in rows}


@pytest.mark.parametrize(
    "page, heading, speed",
    [
        ("README.md", "## What is measured", 1),
        ("docs/performance.md", "## Measured", 1),
        ("docs/results.md", "### Every method at 350M", 2),
        ("docs/results.md", "### Every method at 1B", 2),
        ("benchmarks/lab/headline.md", "## Tables", 1),
        ("benchmarks/lab/performance.md", "## Measured", 1),
        ("benchmarks/lab/results.md", "### Every method at 350M", 2),
        ("benchmarks/lab/results.md", "### Every method at 1B", 2),
    ],
)
def test_tables_of_speed_are_those_of_the_recorded_runs(
    page: str, heading: str, speed: int
) -> None:
    runs = recorded()
    found = rows(page, heading)
    assert len(found) >= 8
    for cells in found:
        assert cells[speed] in runs, cells
        run = runs[cells[speed]]
        assert str(run["peak_memory_gib"]) in cells, cells
        slowest, fastest = run["tokens_per_second_range"]
        if any(" to " in cell for cell in cells):
            assert f"{slowest:,} to {fastest:,}" in cells and f"{run['mfu']:.3f}" in cells, cells
        if speed == 2:
            assert cells[1] == f"{1e3 * run['update_seconds']:.1f}", cells
            assert f"{run['startup_seconds']:.1f}" in cells, cells
