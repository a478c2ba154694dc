"""The command line: what a user's mistakes look like, and that every launcher starts it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalr.config.schema import RunConfig
from tests.ranks import free_port
from tests.synthetic import write_dataset
from tests.training.runs import events, settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launchers" / "pretrain.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")


def _start(*command: str, limit: int | None = None, **variables: str) -> tuple[int, str]:
    """Exit code and combined output of a command, in an environment without a launcher."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", **variables}

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        preexec_fn=set_limit,
    )
    return done.returncode, done.stdout


def _config(tmp_path: Path, data: Path, **sections: dict) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "run", data, **sections)))
    return str(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.updatse=5"], "train.updatse = 5: unknown key; did you mean train.updates?"),
        (["data.train=nowhere"], "nowhere"),
        (["model.vocab_size=100"], "the tokenizer has 120 ids"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (["model.preset=llama_60n"], "did you mean llama_60m?"),
                (["--deepspeed_config", "missing.json"], "missing.json"),
                (
                    ["train.global_batch_size=13"],
                    "train.global_batch_size = 13: must be a multiple of micro_batch_size 2",
                ),
                (
                    ["--allow", "train.updatse", "train.updates=20"],
                    "did you mean train.updates?",
                ),
                (
                    ["method.rank=25"],
                    "method.rank 25 is larger than 24, the smaller side of layers.0.att",
                ),
            )
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, data)
    code, output = _start(sys.executable, SCRIPT, "--config", config, *arguments)
    assert code == 2
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "run").exists()  # a mistake claims no folder


def test_print_config_prints_the_resolved_run_and_stops(data: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, data)
    code, output = _start(
        sys.executable, SCRIPT, "--config", config, "--print_config", "optimizer.lr=1e-4"
    )
    assert code == 0
    printed = yaml.safe_load(output)
    assert printed["optimizer"]["lr"] == 1e-4
    assert printed["checkpoint"]["keep_last"] == 2
    assert not (tmp_path / "run").exists()


def test_print_config_prints_the_run_alone_where_no_device_is_chosen(
    data: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, data)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(Path(config).read_text())
    (folder / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "DS_ACCELERATOR")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    for given in (["--config", config], ["--resume", str(folder)]):
        command = [sys.executable, SCRIPT, *given, "--print_config"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert set(yaml.safe_load(done.stdout)) == set(RunConfig.model_fields)
        values, comments = done.stdout.split("\n#", 1)
        assert all(re.match(r" *[\w.-]+:|  ", line) for line in values.splitlines())
        assert all(line.startswith("#") for line in f"#{comments}".splitlines())


def test_files_and_overrides_after_config_are_distinguished(data: Path, tmp_path: Path) -> None:
    (tmp_path / "lr=0.1").mkdir()
    config = _config(tmp_path / "lr=0.1", data)
    code, output = _start(
        sys.executable,
        SCRIPT,
        "--print_config",
        "--config",
        config,
        "run.dir=./a//b/",
        "run.seed=7",
    )
    assert code == 0, output
    printed = yaml.safe_load(output)
    assert printed["run"] | {"dir": "./a//b/", "seed": 7} == printed["run"]


@pytest.mark.long
def test_deepspeed_torchrun_mpirun_and_plain_python_train_the_same_run(
    data: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    variables = {"MASTER_PORT": port, "PYTHON": sys.executable, "MPIRUN": str(BIN / "mpirun")}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launchers = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port, SCRIPT],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", port, SCRIPT],
        "mpirun": ["launchers/mpi/pretrain.sh", str(hosts), "2"],
        "python": [sys.executable, SCRIPT],
    }
    if not (BIN / "mpirun").exists():
        del launchers["mpirun"]
    last = {}
    for name, command in launchers.items():
        folder = tmp_path / name
        folder.mkdir()
        config = _config(folder, data, train={"updates": 4}, evaluation={"every": 0})
        code, output = _start(*command, "--config", config, **variables)
        assert code == 0, f"{name}: {output[-3000:]}"
        run = folder / "run"
        assert events(run, "start")[0]["world_size"] == (1 if name == "python" else 2)
        last[name] = events(run, "eval")[-1]["loss"]
    assert max(last.values()) - min(last.values()) < 1e-5


@pytest.mark.long
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, data, train={"updates": 4}, checkpoint={"every": 2, "keep_last": 1})
    command = [sys.executable, SCRIPT, "--config", config]
    code, _ = _start(
        *command,
        "train.updates=2",
        "schedule.warmup_updates=0",
        "run.dir=" + str(tmp_path / "sizes"),
    )
    assert code == 0
    sizes = [p.stat().st_size for p in (tmp_path / "sizes").rglob("*.pt")]
    folder = tmp_path / "run"
    code, output = _start(*command, limit=max(sizes) - 1000)
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "could not be written" in line and "previous checkpoint is whole" in line
    assert not list(folder.glob("checkpoints/*/manifest.json"))
    code, output = _start(*command)  # with room again it starts where it can
    assert code == 0, output[-3000:]
    assert [p.parent.name for p in folder.glob("checkpoints/*/manifest.json")] == ["update_4"]
