"""What the shells themselves complete with the scripts of ``megalr completion``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megalr.cli.commands import COMMANDS
from megalr.cli.completion import SHELLS, completion_script
from megalr.cli.main import main

BASH = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(($# - 2))
_megalr_without_space 2>/dev/null  # compopt is for a shell that is waiting for input
printf '%s\\n' "${COMPREPLY[@]}"
"""
CASES = [
    (["me"], ["memory"]),
    (["memory", "--gp"], ["--gpus"]),
    (["memory", "--config", "llama_130m_lor"], ["llama_130m_lora", "llama_130m_loro"]),
    (["memory", "--config", "llama_9m", "train.upd"], ["train.updates="]),
    (["memory", "--config", "llama_9m", "--gpus", "8", "train.upd"], ["train.updates="]),
    (["memory", "--deepspeed_config", "zero3"], ["zero3", "zero3_offload"]),
    (["completion", "z"], ["zsh"]),
    (["inspect", "--data", "dat"], ["data_folder"]),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=lambda value: "-".join(value))
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_word_is_completed(
    shell: str, words: list[str], expected: list[str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(completion_script(shell))
    (tmp_path / "data_folder").touch()
    command = ["bash", "-c", BASH, "bash", str(script), "megalr", *words]
    if shell == "fish":
        line = " ".join(["megalr", *words])
        command = ["fish", "-N", "-c", f"source {script}; complete -C '{line}'"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    found = [line.split("\t")[0] for line in done.stdout.split("\n") if line]
    assert sorted(set(found)) == expected, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_valid_and_name_every_command(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["completion", shell])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert all(command.name in script.read_text() for command in COMMANDS.values())
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n", str(script)], check=True)
