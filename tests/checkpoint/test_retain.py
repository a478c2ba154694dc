"""Names, manifests and retention: pure files, no engine."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from megalr.checkpoint import directory
from megalr.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    Damaged,
    FileRecord,
    check_files,
    manifest_text,
    read_manifest,
    record_of,
)
from megalr.checkpoint.retain import Candidate, delete_superseded, superseded
from megalr.config.schema import RunConfig
from tests.training.runs import settings


def _write(root: Path, name: str, update: int) -> Path:
    """A complete little checkpoint of two files under any name."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"a" * 100)
    (folder / "b.pt").write_bytes(b"b" * 50)
    files = {file: record_of(folder / file) for file in ("a.pt", "b.pt")}
    (folder / MANIFEST).write_text(manifest_text(CheckpointManifest(update, {}, 1.5, files)))
    return folder


@pytest.mark.parametrize(
    "keep, kept",
    [
        ((1, 0, 0), {6}),
        ((2, 0, 0), {5, 6}),
        ((1, 2, 0), {2, 4, 6}),
        ((1, 0, 1), {3, 6}),
        ((1, 4, 2), {1, 3, 4, 6}),
        ((9, 0, 0), {1, 2, 3, 4, 5, 6}),
    ],
)
def test_the_newest_the_periodic_and_the_best_ones_are_kept(
    keep: tuple[int, int, int], kept: set[int]
) -> None:
    losses = {1: 2.0, 2: None, 3: 1.0, 4: 2.0, 5: None, 6: 3.0}  # 1 and 4 are equal: the older
    known = [Candidate(f"update_{update}", update, loss) for update, loss in losses.items()]
    gone = {int(tag.removeprefix("update_")) for tag in superseded(known[::-1], *keep)}
    assert set(losses) - gone == kept


def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    assert directory.tags(tmp_path / "none") == []
    for name in ("update_10", "update_9", "update_9_universal", ".saving-update_11", "update_x"):
        _write(tmp_path, name, 9)
    assert directory.tags(tmp_path) == ["update_9_universal", "update_9", "update_10"]
    assert directory.unfinished(tmp_path) == ["update_11"]
    directory.recover(tmp_path)  # it lacks nothing but the name
    assert directory.tags(tmp_path)[-1] == "update_11" and directory.unfinished(tmp_path) == []

    half = _write(tmp_path, ".saving-update_12", 12)
    (half / MANIFEST).unlink()
    _write(tmp_path, ".trash-update_1", 1)
    directory.recover(tmp_path)
    assert directory.unfinished(tmp_path) == ["update_12"]
    directory.clean(tmp_path)
    assert not half.exists() and not (tmp_path / ".trash-update_1").exists()

    new = _write(tmp_path, ".saving-update_10", 10)
    (new / "a.pt").write_bytes(b"new")
    directory.publish(tmp_path, "update_10")  # in place of an older one of that name
    assert (tmp_path / "update_10" / "a.pt").read_bytes() == b"new"
    directory.discard(tmp_path, "update_10")
    assert directory.tags(tmp_path) == ["update_9_universal", "update_9", "update_11"]
    assert not list(tmp_path.glob(".trash-*"))


def test_a_link_to_a_checkpoint_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for update in (1, 2, 3):
        target = _write(tmp_path / "archive", f"update_{update}", update)
        root.mkdir(exist_ok=True)
        (root / f"update_{update}").symlink_to(target)
    (root / "update_4").symlink_to(tmp_path / "gone")
    (root / ".trash-update_0").symlink_to(tmp_path / "archive" / "update_1")
    assert directory.tags(root) == ["update_1", "update_2", "update_3"]
    directory.discard(root, "update_1")
    for tag in ("update_3", "update_4"):
        (directory.prepare(root, tag) / MANIFEST).write_text("{}")
        directory.publish(root, tag)
    assert directory.clean(root) == []
    assert sorted(path.name for path in root.iterdir()) == ["update_2", "update_3", "update_4"]
    assert [path.is_symlink() for path in sorted(root.iterdir())] == [True, False, False]
    assert len(list((tmp_path / "archive").glob("update_*/a.pt"))) == 3


def test_what_cannot_be_removed_is_named_and_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in ("update_1", "update_2", "update_3"):
        _write(tmp_path, tag, int(tag[-1]))
    _write(tmp_path, ".saving-update_4", 4)
    (tmp_path / ".trash-update_2").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path / "a.pt"))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        values = settings(tmp_path, Path("data"), checkpoint={"keep_last": 1})
        deleted, error = delete_superseded(tmp_path, RunConfig.model_validate(values), 3)
        assert deleted == [] and error is not None
        for tag, trash in (("update_1", ".trash-update_1"), ("update_2", ".trash-update_2-1")):
            assert f"{tag}: Operation not permitted ({tmp_path}/{trash}/a.pt)" in error
        directory.prepare(tmp_path, "update_4")  # in place of one that cannot be removed
        directory.publish(tmp_path, "update_4")
        _write(tmp_path, ".saving-update_3", 3)
        directory.recover(tmp_path)
        assert directory.tags(tmp_path) == ["update_3", "update_4"]
        found = directory.clean(tmp_path)
        assert found == [f"{path}: Operation not permitted" for path in sorted(_trash(tmp_path))]
        assert len(found) == 5
    assert directory.clean(tmp_path) == [] and not _trash(tmp_path)


def _trash(root: Path) -> list[Path]:
    return list(root.glob(".trash-*"))


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, "update_3", 3)
    manifest = read_manifest(folder)
    assert manifest == CheckpointManifest(3, {}, 1.5, manifest.files)
    assert manifest.files["b.pt"] == FileRecord(50, record_of(folder / "b.pt").crc32)

    def problem(checksums: bool = True) -> str | None:
        return check_files(folder, manifest.files, manifest.files, checksums)

    assert problem() is None
    (folder / "b.pt").write_bytes(b"b" * 49 + b"c")
    assert problem() == "b.pt has another checksum than when it was written"
    assert problem(checksums=False) is None
    (folder / "a.pt").write_bytes(b"a" * 99)
    assert problem(checksums=False) == "a.pt has 99 bytes instead of 100"
    (folder / "a.pt").unlink()
    assert problem() == "a.pt is missing"

    path = folder / MANIFEST
    for text, message in (
        (path.read_text()[:-20], "is not a manifest"),
        ("{}", "is not a manifest"),
        (path.read_text().replace('"format": 1', '"format": 7'), "has format 7"),
    ):
        path.write_text(text)
        with pytest.raises(Damaged, match=message):
            read_manifest(folder)
    path.unlink()
    with pytest.raises(Damaged, match="it was never finished"):
        read_manifest(folder)
