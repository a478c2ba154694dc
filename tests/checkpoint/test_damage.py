"""A damaged checkpoint is passed over, a full disk loses nothing, and everything is reported."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megalr.checkpoint.find import find_checkpoint
from megalr.checkpoint.manifest import Damaged, manifest_text, read_manifest, record_of
from megalr.checkpoint.reader import open_checkpoint, open_source
from megalr.checkpoint.reshape import write_universal
from megalr.checkpoint.retain import delete_superseded
from megalr.checkpoint.source import MASTER
from megalr.config.schema import RunConfig
from megalr.engine.checkpoint_files import read_engine_files, write_tensors
from megalr.errors import UserError
from tests.damage import mutated_json
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, losses, run, settings, zero

SECTIONS = {
    "train": {"updates": 6},
    "checkpoint": {"every": 2, "keep_last": 9},
    "evaluation": {"every": 2},
}


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints after 2, 4 and 6 updates."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_distributed(run, 2, settings(folder, data, **SECTIONS), zero(1))
    return folder


def _flip(folder: Path) -> None:
    path = next(folder.glob("*_pp_rank_1_*_optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def _remove(folder: Path) -> None:
    next(folder.glob("*model_states.pt")).unlink()


def _cut(folder: Path) -> None:
    path = next(folder.glob("fragments_*.pt"))
    path.write_bytes(path.read_bytes()[:-1])


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _manifest_without_a_size(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(re.sub(r'"size": \d+', '"size": null', path.read_text(), count=1))


def _state_without_tokens(folder: Path) -> None:
    """The manifest fits the file."""
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"tokens":', '"tokenz":'))
    manifest = read_manifest(folder)
    files = {**manifest.files, path.name: record_of(path)}
    text = manifest_text(dataclasses.replace(manifest, files=files))
    (folder / "manifest.json").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (_flip, "optim_states.pt has another checksum"),
    "missing": (_remove, "model_states.pt is missing"),
    "cut": (_cut, "bytes instead of"),
    "unfinished": (_no_manifest, "it was never finished"),
    "no size": (_manifest_without_a_size, "size: Input should be a valid integer"),
    "no tokens": (_state_without_tokens, "state.json is not a saved state (state.tokens: Field"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_good_checkpoint_is_found_and_the_damaged_one_named(
    name: str, saved: Path, tmp_path: Path
) -> None:
    damage, message = DAMAGES[name]
    folder = shutil.copytree(saved, tmp_path / "run")
    assert find_checkpoint(folder, verify=True).tag == "update_6"
    damage(folder / "checkpoints" / "update_6")
    found = find_checkpoint(folder, verify=True)
    assert found.tag == "update_4"
    (text,) = found.damaged
    assert text.startswith("update_6: ") and message in text
    # Without checksums only what sizes and names show is seen.
    assert (find_checkpoint(folder, verify=False).tag == "update_6") == (name == "flipped")
    for tag in ("update_4", "update_2"):
        damage(folder / "checkpoints" / tag)
    with pytest.raises(UserError, match=r"no good checkpoint \(update_6: .*update_4: .*update_2: "):
        find_checkpoint(folder, verify=True)


def test_a_run_resumes_past_damage_and_says_so(saved: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    expected = losses(folder)
    checkpoints = folder / "checkpoints"
    _flip(checkpoints / "update_6")
    (checkpoints / ".saving-update_8").mkdir()
    (checkpoints / ".trash-update_1").mkdir()
    values = settings(folder, data, **SECTIONS)
    run_distributed(run, 2, values, zero(1))
    (resumed,) = events(folder, "resume")
    assert resumed["update"] == 4 and resumed["path"] == "checkpoints/update_4"
    assert resumed["damaged"][0].startswith("update_6: ") and resumed["unfinished"] == ["update_8"]
    assert losses(folder) == expected
    assert find_checkpoint(folder, verify=True).tag == "update_6"  # written again
    assert not list(checkpoints.glob(".*"))
    assert (checkpoints / "latest").read_text() == "update_6"

    for tag in ("update_2", "update_4", "update_6"):
        _remove(checkpoints / tag)
    with pytest.raises(RankFailed, match="has no good checkpoint"):  # not from scratch
        run_distributed(run, 2, values, zero(1))


class _Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["*model_states.pt", "*_pp_rank_1_*_optim_states.pt"])
def test_code_planted_in_a_checkpoint_does_not_run_and_an_older_one_is_taken(
    kind: str, saved: Path, data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    expected = losses(folder)
    newest = folder / "checkpoints" / "update_6"
    path = next(newest.glob(kind))
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": _Planted(tmp_path / "ran")}, path)
    manifest = read_manifest(newest)
    files = {**manifest.files, path.name: record_of(path)}
    text = manifest_text(dataclasses.replace(manifest, files=files))
    (newest / "manifest.json").write_text(text)

    run_distributed(run, 2, settings(folder, data, **SECTIONS), zero(1))
    (resumed,) = events(folder, "resume")
    assert resumed["path"] == "checkpoints/update_4" and not (tmp_path / "ran").exists()
    (problem,) = resumed["damaged"]
    assert f"{path.name} holds posix.mkdir" in problem and "could run code" in problem
    assert losses(folder) == expected


def test_the_engine_itself_refuses_planted_code(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": _Planted(tmp_path / "ran")}, path)
    engine = SimpleNamespace(checkpoint_engine=TorchCheckpointEngine(None))
    engine.load_checkpoint = lambda root, tag: (engine.checkpoint_engine.load(str(path)), {})
    with pytest.raises(pickle.UnpicklingError, match=r"posix.mkdir"):
        read_engine_files(engine, tmp_path, "tag")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # as DeepSpeed does
    assert (tmp_path / "ran").exists()


def test_the_best_and_the_periodic_checkpoints_stay(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    retention = {"every": 1, "keep_last": 1, "keep_every": 4, "keep_best": 1}
    # The loss rises once the learning rate is absurd.
    sections = {
        "train": {"updates": 7},
        "evaluation": {"every": 1},
        "optimizer": {"lr": 0.5, "weight_decay": 0.0},
    }
    values = settings(folder, data, **sections, checkpoint=retention)
    run_distributed(run, 1, values, zero(1))
    evaluated = {e["update"]: e["loss"] for e in events(folder, "eval")}
    best = min(evaluated, key=lambda update: evaluated[update])
    kept = {int(p.name.split("_")[1]) for p in (folder / "checkpoints").glob("update_*")}
    assert best not in (4, 7) and kept == {best, 4, 7}
    deleted = [tag for event in events(folder, "checkpoint") for tag in event["deleted"]]
    assert len(deleted) == 7 - len(kept)


def test_a_damaged_checkpoint_of_a_later_update_does_not_push_out_good_ones(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    _flip(folder / "checkpoints" / "update_6")
    one = settings(folder, data, **SECTIONS | {"checkpoint": {"keep_last": 1}})
    config = RunConfig.model_validate(one)
    # As after the save at update 4 of the run that went on from update 2 or 4.
    assert delete_superseded(folder / "checkpoints", config, 4) == (["update_2"], None)
    assert find_checkpoint(folder, verify=True).tag == "update_4"


def _run_with_full_disk(values: dict[str, Any], limit: int) -> None:
    """A run in which rank 1 alone cannot write files above ``limit`` bytes."""
    import torch.distributed as dist

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    outputs = [os.dup(1), os.dup(2)]
    if dist.get_rank() == 1:
        # What pytest collects of this process's output is a file as well, and long by now.
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        run(values, zero(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for number, output in enumerate(outputs):
            os.dup2(output, number + 1)
            os.close(output)


def test_one_rank_with_a_full_disk_stops_all_with_one_line_and_nothing_is_lost(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    for tag in ("update_4", "update_6"):
        shutil.rmtree(checkpoints / tag)
    size = next((checkpoints / "update_2").glob("*_pp_rank_1_*_optim_states.pt")).stat().st_size
    values = settings(folder, data, **SECTIONS)
    with pytest.raises(RankFailed) as failure:
        run_distributed(_run_with_full_disk, 2, values, size // 2)
    line = str(failure.value).splitlines()[-1]
    assert "update_4 could not be written (rank 1: File too large)" in line
    assert "the previous checkpoint is whole" in line
    assert not list(checkpoints.glob(".saving-*"))
    assert find_checkpoint(folder, verify=True).tag == "update_2"
    run_distributed(run, 2, values, zero(1))
    assert losses(folder) == losses(saved)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_called_full(small_disk: Path, saved: Path, tmp_path: Path) -> None:
    """Where torch's writer says "unexpected pos"; also with a name that is too long."""
    for path, message in (
        (small_disk / "x.pt", "No space left on device"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(OSError, match=message):
            write_tensors({"a": torch.zeros(1 << 19)}, path)
    (small_disk / "x.pt").unlink()

    run_dir = small_disk / "run"
    newest = shutil.copytree(saved / "checkpoints" / "update_6", run_dir / "checkpoints/update_6")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(bytes(free - 40_000))
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
        write_universal(open_checkpoint(run_dir))
    assert [path.name for path in newest.parent.iterdir()] == ["update_6"]


def test_mutated_descriptions_of_files_are_read_or_damaged(saved: Path, tmp_path: Path) -> None:
    """One value of ``fragments_*.pt`` changed, as if the manifest had been made for it."""
    folder = tmp_path / "update_6"
    shutil.copytree(saved / "checkpoints" / "update_6", folder)
    path = folder / "fragments_00001_000.pt"
    whole = torch.load(path, weights_only=True)
    for flat in whole["flats"]:
        flat["master"], flat["state"] = list(flat["master"]), list(flat["state"])
    outcomes = {"read": 0, "damaged": 0}
    for seed in range(300):
        torch.save(mutated_json(whole, seed), path)
        try:
            source = open_source(folder)
            for name in source.names():
                for key in (MASTER, *source.element_states(name)):
                    source.elements(name, key, 0, math.prod(source.shape(name)))
                source.scalars(name)
            outcomes["read"] += 1
        except Damaged as error:
            assert "\n" not in str(error)
            outcomes["damaged"] += 1
    assert outcomes["damaged"] > 150 and outcomes["read"] > 5, outcomes
