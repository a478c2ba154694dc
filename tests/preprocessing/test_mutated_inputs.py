"""Damaged inputs and records of earlier runs: one line or a count, never a traceback."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalr.errors import UserError
from megalr.preprocessing.tokenizer import open_tokenizer
from megalr.readers.documents import DocumentReader, ReadOptions, ReadReport
from megalr.readers.input_splits import InputSplit
from megalr.readers.token_sources import TokenReader
from tests.damage import mutated_bytes, mutated_json
from tests.data.shards import random_documents, write_shard
from tests.preprocessing.corpus import prose, tiny_tokenizer, write_jsonl
from tests.preprocessing.test_job import contents, preprocess
from tests.preprocessing.test_token_sources import write_ds

TEXTS = prose(60)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _parquet(path: Path) -> None:
    codec = path.stem
    table = pyarrow.table({"text": TEXTS, "number": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, path, compression=codec, row_group_size=20)


def _arrow(path: Path) -> None:
    column = pyarrow.array(TEXTS, pyarrow.string_view() if "view" in path.stem else None)
    if "dictionary" in path.stem:
        column = column.dictionary_encode()
    table = pyarrow.table({"text": column})
    new = pyarrow.ipc.new_file if "file" in path.stem else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.txt": lambda path: path.write_bytes(LINES),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    ),
    "none.parquet": _parquet,
    "snappy.parquet": _parquet,
    "zstd.parquet": _parquet,
    "stream.arrow": _arrow,
    "file.arrow": _arrow,
    "view.arrow": _arrow,
    "dictionary.arrow": _arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_mutated_text_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    read = 0
    for seed in range(250):
        path.write_bytes(mutated_bytes(whole, seed))
        reader = DocumentReader(InputSplit(path, 1), ReadOptions(max_bad_lines=5))
        try:
            found = [text for batch in reader for text in batch]
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 800 + len(str(path)), seed
            continue
        read += 1
        assert len(found) == reader.report.records - reader.report.bad - reader.report.empty
        if name.endswith((".gz", ".zst")):  # the formats' own checksums
            assert set(found) <= set(TEXTS), seed
    assert read > 0  # some mutations change nothing


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "b.ds", "b.ds.index", "b.ds.metadata"])
def test_mutated_token_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    documents = random_documents(40, vocab_size=400)
    write_shard(tmp_path, "a", documents, vocab_size=400)
    write_ds(tmp_path / "b.ds", documents)
    tokenizer = open_tokenizer(tiny_tokenizer())
    source = InputSplit(tmp_path / ("a.bin" if name.startswith("a") else "b.ds"), 1)
    whole = (tmp_path / name).read_bytes()
    for seed in range(250):
        (tmp_path / name).write_bytes(mutated_bytes(whole, seed))
        try:
            for ids, lengths in TokenReader(source, tokenizer, tokenizer.eos_id, ReadReport()):
                assert len(ids) == lengths.sum()
                assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        except UserError as error:
            assert "\n" not in str(error), seed


@pytest.mark.parametrize("older", [False, True])
def test_mutated_records_of_finished_inputs_lose_nothing(tmp_path: Path, older: bool) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS, [b"{broken"])
    settings = {"validation_fraction": 0.2, "reading": ReadOptions(max_bad_lines=1)}
    expected = tmp_path / "expected"
    preprocess([source], expected, **settings)
    record = json.loads((expected / "finished" / "a.json").read_text())
    if older:
        del record["sha256"]
    output = tmp_path / "data"
    shutil.copytree(expected, output)
    files = {n: c for n, c in contents(expected).items() if n.endswith((".bin", ".idx"))}
    for seed in range(50):
        changed = mutated_json(record, seed)
        (output / "finished" / "a.json").write_text(json.dumps(changed))
        summary = preprocess([source], output, **settings)
        assert summary.complete and summary.bad_lines == 1
        found = contents(output)
        assert {name: found[name] for name in files} == files, seed
        if not older:
            assert found["manifest.json"] == (expected / "manifest.json").read_bytes(), seed


def test_mutated_settings_of_a_job_are_refused_in_one_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    output = tmp_path / "data"
    preprocess([source], output)
    whole = (output / "job.json").read_bytes()
    for seed in range(100):
        (output / "job.json").write_bytes(mutated_bytes(whole, seed))
        try:
            assert preprocess([source], output).reused == 1
            assert json.loads((output / "job.json").read_bytes()) == json.loads(whole), seed
        except UserError as error:
            assert "job.json: " in str(error) and "\n" not in str(error), seed
