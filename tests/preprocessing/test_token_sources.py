"""Token files of other programs as input, and Megatron-Core's own reader and writer."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError
from tests.data.shards import random_documents, write_shard
from tests.preprocessing.corpus import write_jsonl
from tests.preprocessing.test_job import documents_of, preprocess

DOCUMENTS = [*random_documents(40, vocab_size=400), [7, 8, 9]]  # the last one has no EOS
WITH_EOS = [*DOCUMENTS[:-1], [7, 8, 9, 1]]


def write_ds(
    path: Path, documents: list[list[int]], kind: str = "H", metadata: bool = True
) -> Path:
    """datatrove's three files, put together by hand."""
    flat = [token for document in documents for token in document]
    path.write_bytes(struct.pack(f"<{len(flat)}{kind}", *flat))
    ends = np.cumsum([len(document) for document in documents])
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends.tolist()))
    if metadata:
        size = struct.calcsize(kind)
        Path(f"{path}.metadata").write_text(f"tok|{size}\n{len(flat)}\n{len(flat)} T")
    return path


@pytest.mark.parametrize("kind", ["H", "I"])
@pytest.mark.parametrize("metadata", [True, False])
def test_datatrove_files_become_shards(tmp_path: Path, kind: str, metadata: bool) -> None:
    path = write_ds(tmp_path / "a.ds", DOCUMENTS, kind, metadata)
    summary = preprocess([path], tmp_path / "data")
    assert documents_of(tmp_path / "data" / "a") == WITH_EOS
    assert summary.documents == len(DOCUMENTS)
    preprocess([path], tmp_path / "bare", append_eos=False)
    assert documents_of(tmp_path / "bare" / "a") == DOCUMENTS


def test_megatron_files_become_shards_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalr.readers.token_sources.TOKENS_AT_ONCE", 100)
    write_shard(tmp_path, "a", [*DOCUMENTS, []], vocab_size=400)
    summary = preprocess([tmp_path / "a.bin"], tmp_path / "data")
    assert documents_of(tmp_path / "data" / "a") == WITH_EOS
    assert summary.empty_documents == 1


def test_held_out_documents_of_token_files_are_chosen_by_hash(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", WITH_EOS, vocab_size=400)
    preprocess([tmp_path / "a.bin"], tmp_path / "data", validation_fraction=0.3)
    held = documents_of(tmp_path / "data" / "a.validation")
    kept = documents_of(tmp_path / "data" / "a")
    assert 0 < len(held) < 25
    assert sorted(held + kept) == sorted(WITH_EOS)


def test_token_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    path = write_ds(tmp_path / "a.ds", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"a\.ds: .* bytes, but its index describes"):
        preprocess([path], tmp_path / "data")
    (tmp_path / "a.ds.index").unlink()
    with pytest.raises(UserError, match=r"a\.ds\.index: no such file"):
        preprocess([path], tmp_path / "data")
    write_ds(tmp_path / "b.ds", [[5, 40_000]])
    with pytest.raises(UserError, match="id 40000, outside its vocabulary of 500"):
        preprocess([tmp_path / "b.ds"], tmp_path / "other")


def test_inputs_in_the_output_folder_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", DOCUMENTS, vocab_size=400)
    with pytest.raises(UserError, match="lies in the output folder"):
        preprocess([tmp_path / "a.bin"], tmp_path)
    link = tmp_path / "elsewhere" / "a.bin"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "a.bin")
    with pytest.raises(UserError, match="lies in the output folder"):
        preprocess([link], tmp_path)


MEGATRON = """
import json, sys
import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
ours, theirs, documents = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for dtype in (numpy.uint16, numpy.int32):
    builder = IndexedDatasetBuilder(f"{theirs}-{numpy.dtype(dtype)}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{theirs}-{numpy.dtype(dtype)}.idx")
reader = IndexedDataset(ours)
print(json.dumps({
    "documents": [reader[i].tolist() for i in range(len(reader))],
    "boundaries": reader.document_indices.tolist(),
}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)
def test_megatron_core_reads_our_shards_and_we_read_its_shards(tmp_path: Path) -> None:
    texts = ["one document", "another one", "and the last"]
    preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "data")
    ours = documents_of(tmp_path / "data" / "a")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            MEGATRON,
            str(tmp_path / "data" / "a"),
            str(tmp_path / "theirs"),
            json.dumps(DOCUMENTS),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.strip().splitlines()[-1])
    assert read == {"documents": ours, "boundaries": [0, 1, 2, 3]}
    for name in ("uint16", "int32"):
        shard = IndexedShard(tmp_path / f"theirs-{name}")
        assert [shard.document(i).tolist() for i in range(len(DOCUMENTS))] == DOCUMENTS
    # The same documents give the same bytes, whoever writes them.
    write_shard(tmp_path, "same", DOCUMENTS, vocab_size=400)
    for suffix in (".bin", ".idx"):
        written = (tmp_path / f"theirs-uint16{suffix}").read_bytes()
        assert (tmp_path / f"same{suffix}").read_bytes() == written


def test_ids_of_another_tokenizer_are_named_as_such(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [[5, 9, 1], [700, 1]], vocab_size=1000)
    write_ds(tmp_path / "b.ds", [[5, 40_000]])
    for name, wrong in (("a.bin", 700), ("b.ds", 40_000)):
        with pytest.raises(
            UserError,
            match=rf"{name}: was made with another tokenizer than .*: it holds id {wrong}",
        ):
            preprocess([tmp_path / name], tmp_path / f"data-{name}")


def test_the_ends_of_a_datatrove_file_must_ascend(tmp_path: Path) -> None:
    path = write_ds(tmp_path / "a.ds", [[5, 6], [7, 8]])
    for ends in ([3, 2, 4], [2**64 - 1, 4], [2**63, 4]):
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        with pytest.raises(UserError, match=r"a\.ds\.index: the document ends are not ascending"):
            preprocess([path], tmp_path / "data")
    write_ds(path, [[5, 6], [7, 8]])
    Path(f"{path}.metadata").write_bytes(b"\xff\xfe|2\n")
    assert preprocess([path], tmp_path / "data").documents == 2
