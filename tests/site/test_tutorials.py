"""Every command of docs/tutorials runs, in the order of the page, on little text."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
LINKED = ("tools", "launchers", "recipes", "ds_configs", "docs")
"""Folders of the repository that the commands name."""
FEW = [
    *("train.updates=2", "schedule.warmup_updates=1", "evaluation.every=0"),
    *("evaluation.tokens=512", "data.sequence_length=32", "checkpoint.every=0"),
]
SMALLER = {
    "python tools/gather_docs.py": ["--packages", str(ROOT / "docs"), str(ROOT / "benchmarks")],
    "megalr tokenizer": ["--vocab_size", "1024"],
    # The pages of this repository are some hundred documents: of one in a hundred none might be
    # held out.
    "megalr data": ["--validation_fraction", "0.2"],
    "megalr train --config recipes/": FEW,
    "megalr train --resume": ["train.updates=3"],
    "megalr sweep": ["--only", "full_rank*lr=2e-3*", *FEW[:2], "evaluation.tokens=512"],
}
"""Words behind a command that begins so: where one is given twice, the last counts."""


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the blocks of a page that are to be typed, in order."""
    text = (PAGES / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language != "text":
            yield language, block


def run_page(page: str, folder: Path) -> str:
    """Run everything of a page in ``folder``; what it printed."""
    printed = ""
    for language, block in blocks(page):
        lines = [block] if language == "python" else block.replace("\\\n", " ").splitlines()
        for line in lines:
            command = [sys.executable, "-c", line]
            if language != "python":
                more = [words for start, words in SMALLER.items() if line.startswith(start)]
                command = [
                    "bash",
                    "-c",
                    f"{line} {shlex.join([w for words in more for w in words])}",
                ]
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment(folder),
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, f"{page}: {line}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    return printed


def environment(folder: Path) -> dict[str, str]:
    """Of a shell with the environment of this interpreter, on a CPU, without a launcher."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the repository, for what the tutorials write."""
    folder = tmp_path_factory.mktemp("tutorials")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    command = folder / "bin" / "megalr"
    command.parent.mkdir()
    call = "from megalr.cli.main import console; console()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{call}" "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    run_page("first_run.md", place)
    return place


@pytest.mark.long
def test_first_run(first: Path) -> None:
    assert (first / "first.html").stat().st_size > 100_000
    assert '"event": "end"' in (first / "runs/first/metrics.jsonl").read_text()
    assert (first / "runs/first/checkpoints/update_3").is_dir()


@pytest.mark.long
def test_my_data(place: Path) -> None:
    run_page("my_data.md", place)
    assert (place / "runs/mine/checkpoints/update_2").is_dir()


@pytest.mark.long
def test_compare_methods(first: Path) -> None:
    run_page("compare_methods.md", first)
    assert "| full_rank |" in (first / "sweeps/first/table.md").read_text()


def test_the_sweep_of_the_tutorial_is_the_file() -> None:
    text = (PAGES / "compare_methods.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(base:.*?)^```", text, re.MULTILINE | re.DOTALL)
    file = ROOT / "recipes" / "sweeps" / "quickstart.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.long
def test_cluster(first: Path) -> None:
    printed = run_page("cluster.md", first)
    assert "#SBATCH --nodes=4" in printed


@pytest.mark.long
def test_use_the_model(first: Path) -> None:
    run_page("use_the_model.md", first)
    assert (first / "out/tuned/config.json").is_file()
    assert (first / "runs/tuned/checkpoints/update_2").is_dir()


def test_blocks_that_are_not_run_name_what_needs_a_machine_of_their_own() -> None:
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert re.match(r"(make venv|base:|sbatch|mpirun) ?", block), (page.name, block)
