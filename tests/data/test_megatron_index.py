"""The .bin/.idx pair: the exact bytes, what the reader returns, what it refuses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megalr.data.megatron_index import IndexedShard, token_dtype
from megalr.errors import UserError
from megalr.preprocessing.shard_writer import ShardWriter
from tests.data.shards import megatron_index, random_documents, write_shard


def test_the_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1], [7, 1], [9, 8, 7, 1]])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<9H", 5, 6, 1, 7, 1, 9, 8, 7, 1)
    assert (tmp_path / "a.idx").read_bytes() == megatron_index([3, 2, 4])
    assert (tmp_path / "a.idx").stat().st_size == 42 + 20 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_large_vocabularies_get_int32_whatever_ids_occur(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [[5, 1]], vocab_size=70_000)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<2i", 5, 1)
    assert (tmp_path / "a.idx").read_bytes() == megatron_index([2], code=4, itemsize=4)
    assert [token_dtype(n) for n in (65_499, 65_500, 65_536)] == [np.uint16, np.int32, np.int32]
    with ShardWriter(tmp_path / "b", 200_000) as writer:
        writer.add(np.array([199_999, 65_536, 1]), np.array([3], np.int32))
        writer.finish()
    assert IndexedShard(tmp_path / "b").tokens.tolist() == [199_999, 65_536, 1]


def test_an_id_outside_the_vocabulary_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="id 100, outside its vocabulary of 100"):
        write_shard(tmp_path, "a", [[5, 100]])
    assert not list(tmp_path.iterdir())


def test_index_written_in_blocks_equals_the_index_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(50)
    monkeypatch.setattr("megalr.preprocessing.shard_writer.BLOCK", 7)
    write_shard(tmp_path, "a", documents)
    assert (tmp_path / "a.idx").read_bytes() == megatron_index([len(d) for d in documents])


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    documents = random_documents(30)
    write_shard(tmp_path, "a", documents)
    shard = IndexedShard(tmp_path / "a")
    assert [shard.document(i).tolist() for i in range(30)] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    with pytest.raises(UserError, match="no document 30, it has 30"):
        shard.document(30)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<6H", 3, 4, 5, 6, 7, 8))
    index = megatron_index([2, 1, 3])[:-32]
    index = index[:26] + struct.pack("<Q", 4) + index[34:] + struct.pack("<4q", 0, 2, 2, 3)
    (tmp_path / "a.idx").write_bytes(index)
    shard = IndexedShard(tmp_path / "a")
    assert [shard.document(i).tolist() for i in range(3)] == [[3, 4, 5], [], [6, 7, 8]]


def _damage(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


# Three documents of 3, 2 and 4 ids: lengths at byte 34, pointers at 46, documents at 70.
DAMAGES = {
    "magic": (0, b"XX", r"starts with b'XXIDIDX"),
    "version": (9, struct.pack("<Q", 2), "index version 2"),
    "dtype unknown": (17, b"\x63", "dtype code 99"),
    "dtype float": (17, b"\x07", "dtype code 7"),
    "dtype wider": (17, b"\x04", r"bytes"),
    "sequence count": (18, struct.pack("<Q", 5), "5 sequences and 3 documents need"),
    "document count": (26, struct.pack("<Q", 9), "3 sequences and 8 documents need"),
    "length": (34, struct.pack("<i", 2), "starts at byte 6, the lengths before it add up to 4"),
    "last length": (42, struct.pack("<i", 7), "its index describes 24"),
    "negative length": (34, struct.pack("<i", -3), "length -3"),
    "pointer": (54, struct.pack("<q", 8), "sequence 1 starts at byte 8"),
    "boundary": (78, struct.pack("<q", 3), "runs from sequence 3 back to 2"),
    "first boundary": (70, struct.pack("<q", 1), "run from 1 to 3"),
    "last boundary": (94, struct.pack("<q", 2), "run from 0 to 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_index_is_refused_with_its_name_and_the_value(tmp_path: Path, kind: str) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1], [7, 1], [9, 8, 7, 1]])
    offset, content, message = DAMAGES[kind]
    _damage(tmp_path / "a.idx", offset, content)
    with pytest.raises(UserError, match=rf"a\.(idx|bin): .*{message}"):
        IndexedShard(tmp_path / "a")


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
@pytest.mark.parametrize("change", [-1, -2, -20, 2])
def test_truncated_or_longer_files_are_refused(tmp_path: Path, name: str, change: int) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1], [7, 1], [9, 8, 7, 1]])
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(UserError, match=r"a\.(bin|idx): .*bytes"):
        IndexedShard(tmp_path / "a", check="quick")


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
def test_missing_and_empty_files_are_refused(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1]])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="bytes"):
        IndexedShard(tmp_path / "a")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        IndexedShard(tmp_path / "a")


@pytest.mark.parametrize("kind", ["length", "negative length", "pointer", "boundary"])
def test_damage_that_a_quick_open_misses_is_caught_when_the_document_is_read(
    tmp_path: Path, kind: str
) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1], [7, 1], [9, 8, 7, 1]])
    offset, content, _ = DAMAGES[kind]
    _damage(tmp_path / "a.idx", offset, content)
    shard = IndexedShard(tmp_path / "a", check="quick")
    with pytest.raises(UserError, match=r"a\.idx"):
        [shard.document(number) for number in range(3)]


def test_no_single_byte_of_header_lengths_and_pointers_can_change_unnoticed(tmp_path: Path) -> None:
    documents = [[5, 6, 1], [7, 1], [9, 8, 7, 1]]
    write_shard(tmp_path, "a", documents)
    sound = (tmp_path / "a.idx").read_bytes()
    for offset in range(70):
        for flip in (0x01, 0x80):
            _damage(tmp_path / "a.idx", offset, bytes([sound[offset] ^ flip]))
            with pytest.raises(UserError):
                IndexedShard(tmp_path / "a")
            (tmp_path / "a.idx").write_bytes(sound)


def test_foreign_indices_are_named_as_what_they_are(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [[5, 6, 1], [7, 1]])
    sound = (tmp_path / "a.idx").read_bytes()
    for content, message in [
        (b"TNTIDX\x00\x00" + struct.pack("<QQ", 1, 4) + bytes(40), r"old format of fairseq"),
        (sound[:9] + struct.pack("<Q", 2) + sound[17:], "index version 2, only 1 is known"),
        (sound + bytes(2), r"a multimodal index \(2 bytes of modes"),
    ]:
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.idx: .*{message}") as caught:
            IndexedShard(tmp_path / "a")
        assert "damaged" not in str(caught.value)
