"""The ``megalr`` command: its help, its mistakes, how options are spelled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalr.cli.command_line import find_file, packaged_names, parse_run, spelled
from megalr.cli.commands import COMMANDS
from megalr.cli.main import main
from megalr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "pydantic", "numpy", "datasets", "yaml", "plotly")


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_heavy_package_and_shows_an_example(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from megalr.cli.main import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "imported: []"
    names = [words[0]] if words[0] in COMMANDS else list(COMMANDS)
    for name in names:
        assert COMMANDS[name].example in done.stdout
        assert COMMANDS[name].summary.split()[0] in done.stdout


def test_training_imports_what_every_run_needs() -> None:
    """Transformers alone takes more than a second, and few runs start from a pretrained model."""
    unneeded = ("transformers", "datasets", "sentencepiece", "plotly", "matplotlib")
    code = (
        "import sys, megalr.training.pretrain\n"
        f"print([name for name in {unneeded!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_program_of_a_checkout_shows_its_commands_help() -> None:
    for command in COMMANDS.values():
        if command.program is not None:
            text = (ROOT / command.program).read_text()
            function = "pretrain" if command.name == "train" else command.name
            assert f"exit_cleanly({function}_command)" in text, command.program
    done = subprocess.run(
        [sys.executable, "tools/inspect_data.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("usage: inspect_data.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memroy"], "megalr has no command 'memroy'; did you mean memory?"),
        (["?"], "megalr has no command '[?]'; the commands are tokenizer, data,"),
        (["memory", "--gpus", "8"], "--config is missing"),
        (["memory", "--gpus", "8", "--config", "llama_60n"], "did you mean llama_60m?"),
        (["submit", "--nodes", "1", "--gpus", "8", "--time", "60"], "--config is missing"),
        (["sweep", "--output", "out"], "--config names 0 files: give one sweep"),
        (["sweep", "--output", "out", "a.yaml", "--config", "b.yaml"], "--config names 2 files"),
        (["report"], "--run is missing: give folders of runs"),
        (["export", "--output", "out"], "--run is not given: give it once"),
        (["inspect"], "--data is not given: give it once"),
        (["inspect", "a", "--data", "b"], "--data is b and a: give it once"),
    ],
)
def test_a_mistake_names_what_is_meant(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_options_are_accepted_with_dashes_and_under_former_names() -> None:
    words = ["--dry-run", "--max-bad-lines=0.1-2", "--old-name", "a-b", "-x", "--", "--as-is"]
    found = spelled(words, {"--old_name": "--new"})
    assert found == ["--dry_run", "--max_bad_lines=0.1-2", "--new", "a-b", "-x", "--", "--as-is"]


def test_overrides_keep_their_order_wherever_they_stand(tmp_path: Path) -> None:
    parser = COMMANDS["memory"].parser()
    (tmp_path / "lr=0.1").mkdir()
    file = tmp_path / "lr=0.1" / "run.yaml"
    file.touch()
    words = ["run.seed=1", "--config", str(file), "run.seed=2", "--gpus", "8", "run.seed=3"]
    found = parse_run(parser, [*words, "--config", "more.yaml", "run.seed=2"])
    assert found.config == [str(file), "more.yaml"]
    assert found.overrides == ["run.seed=1", "run.seed=3", "run.seed=2", "run.seed=2"]


def test_recipes_are_found_by_name_and_files_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("llama_60m") == ROOT / "recipes" / "llama_60m.yaml"
    assert find_file("llama_60m_loro") == ROOT / "recipes" / "methods" / "llama_60m_loro.yaml"
    assert find_file("qwen3_0.6b") == ROOT / "recipes" / "qwen3_0.6b.yaml"
    assert find_file("zero2", "DeepSpeed JSON") == ROOT / "ds_configs" / "zero2.json"
    for path in ("llama_60m.yaml", "recipes/llama_60m", "missing.yaml"):
        assert find_file(path) == Path(path)  # a path stays one, and is an error where it is read
    (tmp_path / "llama_60m").touch()
    assert find_file("llama_60m") == Path("llama_60m")
    files = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "methods").glob("*.yaml")]
    assert sorted(packaged_names("recipe").values()) == sorted(files)
