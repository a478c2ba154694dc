"""Names, manifests and retention: pure files, no engine."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from random import Random

import pytest

from megalr.checkpoint import directory
from megalr.checkpoint import manifest as manifest_module
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
from megalr.checkpoint.source import STATE, SavedState
from megalr.config.schema import RunConfig
from tests.damage import mutated_bytes
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


NO_MANIFESTS = [
    ("size", "null"),
    ("size", "-1"),
    ("size", "100.0"),
    ("size", '"100"'),
    ("size", "true"),
    ("crc32", "4294967296"),
    ("update", "null"),
    ("update", "-3"),
    ("update", "3.5"),
    ("validation_loss", '"low"'),
    ("layout", "[]"),
    ("layout", "[" * 5000),
    ("files", "[]"),
    ("files", '{"/etc/passwd": {"size": 1, "crc32": 1}}'),
    ("files", '{"a/../../b": {"size": 1, "crc32": 1}}'),
    ("format", "true"),
]


@pytest.mark.parametrize("key, value", NO_MANIFESTS)
def test_a_manifest_with_a_value_of_another_type_is_damaged(
    key: str, value: str, tmp_path: Path
) -> None:
    folder = _write(tmp_path, "update_3", 3)
    path = folder / MANIFEST
    found = re.search(rf'"{key}": (\{{.*\}}|\S+?)(?=,?\n)', path.read_text(), re.DOTALL)
    assert found is not None
    path.write_text(path.read_text().replace(found[0], f'"{key}": {value}', 1))
    with pytest.raises(Damaged) as damage:
        read_manifest(folder)
    assert "\n" not in str(damage.value) and len(str(damage.value)) < 300


def test_a_manifest_may_hold_infinities(tmp_path: Path) -> None:
    """A diverged run is evaluated and saved like any other."""
    folder = _write(tmp_path, "update_3", 3)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("1.5", "Infinity"))
    assert read_manifest(folder).validation_loss == float("inf")


def test_mutated_manifests_and_states_are_read_or_damaged(tmp_path: Path) -> None:
    folder = _write(tmp_path, "update_3", 3)
    counters = {"global_steps": 3, "global_samples": 9, "skipped_steps": 0}
    loop = {"tokens": 7, "batch_offset": 0, "data_fingerprint": "ab", "health": {"skipped": 0}}
    saved = SavedState(3, {"train": {"updates": 6}}, counters, loop)
    (folder / STATE).write_text(saved.text())
    assert SavedState.read(folder) == saved
    random = Random(18)
    for name, read in ((MANIFEST, read_manifest), (STATE, SavedState.read)):
        path = folder / name
        whole = path.read_bytes()
        read_again = 0
        for _ in range(400):
            path.write_bytes(mutated_bytes(whole, random.randrange(2**32)))
            try:
                result = read(folder)
            except Damaged as error:
                assert "\n" not in str(error)
                continue
            read_again += 1
            assert isinstance(result, CheckpointManifest | SavedState)
            assert type(result.update) is int and result.update >= 0
            if isinstance(result, CheckpointManifest):
                check_files(folder, result.files, result.files, checksums=True)
        assert 0 < read_again < 200
        path.write_bytes(whole)


def test_a_file_that_is_no_regular_file_or_too_large_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path, "update_3", 3)
    monkeypatch.setattr(manifest_module, "LARGEST_JSON", 1 << 20)
    (folder / MANIFEST).write_text(" " * ((1 << 20) + 1))
    with pytest.raises(Damaged, match="larger than 1 MiB"):
        read_manifest(folder)
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(Damaged, match="not a regular file"):
        read_manifest(folder)
