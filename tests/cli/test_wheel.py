"""The package as ``pip install`` leaves it: the command and its recipes, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megalr", "recipes", "ds_configs", "launchers")
FILES = ("setup.py", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of the working tree installed in it."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    source.mkdir()
    for name in FOLDERS:  # setuptools writes into the folder that it builds from
        shutil.copytree(ROOT / name, source / name)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(home), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = home.glob("megalr-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(home / "site")]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    shutil.rmtree(source)
    return home / "site"


def _megalr(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(installed / "bin" / "megalr"), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


@pytest.mark.long
def test_the_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = _megalr(installed, tmp_path, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: megalr"), done.stderr
    done = _megalr(installed, tmp_path, "keys", "optimizer")
    assert "optimizer.lr " in done.stdout, done.stderr
    done = _megalr(installed, tmp_path, "memory", "--config", "llama_9m", "--gpus", "1")
    assert done.returncode == 0 and "\npeak " in done.stdout, done.stderr
    words = ("train", "--config", "llama_9m", "--print-config", "run.seed=1", "run.seed=7")
    done = _megalr(installed, tmp_path, *words, "--deepspeed_config", "zero2")
    printed = yaml.safe_load(done.stdout)
    assert (printed["model"]["preset"], printed["run"]["seed"]) == ("llama_9m", 7), done.stderr
    assert '"stage": 2' in done.stdout
    size = ("--nodes", "1", "--gpus", "4", "--time", "60", "data.train=/data")
    done = _megalr(installed, tmp_path, "submit", "--config", "llama_60m", *size, "--dry-run")
    assert f"PYTHON=${{PYTHON:-{sys.executable}}}\n" in done.stdout, done.stderr
    script = installed / "megalr" / "launchers" / "pretrain.py"
    assert f"PRETRAIN=${{PRETRAIN:-{script}}}\n" in done.stdout and script.is_file()
    done = _megalr(installed, tmp_path, "memroy")
    assert done.returncode == 2
    assert done.stderr == "error: megalr has no command 'memroy'; did you mean memory?\n"
    assert not list(tmp_path.iterdir())


def test_all_recipes_and_scripts_are_installed_as_they_are_here(installed: Path) -> None:
    for kind, source in (
        ("recipes", ROOT / "recipes"),
        ("ds_configs", ROOT / "ds_configs"),
        ("launchers", ROOT / "launchers"),
    ):
        files = [path for path in source.rglob("*") if path.suffix in (".yaml", ".json", ".py")]
        files += source.rglob("pretrain.sbatch")
        assert files
        for path in files:
            copy = installed / "megalr" / kind / path.relative_to(source)
            assert copy.read_bytes() == path.read_bytes(), path
