"""Reading documents: every format, bad records, damaged files, ranges of a large file."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalr.errors import UserError
from megalr.readers.documents import DocumentReader, ReadOptions, ReadReport
from megalr.readers.input_splits import InputSplit, plan_splits
from tests.preprocessing.corpus import prose, write_jsonl


def _read(path: Path, **options: object) -> tuple[list[str], ReadReport]:
    reader = DocumentReader(InputSplit(path, path.stat().st_size), ReadOptions(**options))  # type: ignore[arg-type]
    return [text for texts in reader for text in texts], reader.report


def _write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        half = len(lines) // 2
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))  # two members
    elif path.suffix == ".zst":
        half = len(lines) // 2
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(lines[:half]) + compressor.compress(lines[half:]))
    elif path.suffix == ".parquet":
        table = pyarrow.table({"text": texts, "url": ["x"] * len(texts)})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        path.write_bytes(lines)
    return path


NAMES = ["a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_documents_and_the_checksum_of_the_file(
    tmp_path: Path, name: str
) -> None:
    texts = prose(300)
    path = _write(tmp_path / name, texts)
    found, report = _read(path)
    assert found == texts
    assert (report.records, report.bad, report.empty) == (300, 0, 0)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = _write(tmp_path / name, prose(300))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=rf"{name}: .*(truncated|damaged)") as caught:
        _read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.zst"])
def test_flipped_bits_are_noticed(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, prose(300))
    content = bytearray(path.read_bytes())
    content[0] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{name}: damaged"):
        _read(path)


def test_bad_records_are_counted_described_and_skipped(tmp_path: Path) -> None:
    bad = [
        b'{"text": "open',
        b'{"url": "no text"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'["text"]',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800 alone"}',
        b"[" * 100_000,
        b'{"text": "x", "id": ' + b"9" * 5000 + b"}",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", prose(9), bad)
    found, report = _read(path, max_bad_lines=9)
    assert found == prose(9)
    assert (report.records, report.bad) == (18, 9)
    assert report.reasons == [
        "line 1: invalid JSON: Invalid control character at (column 15)",
        "line 2: no field 'text'",
        "line 3: 'text' is int, not a string",
        "line 4: 'text' is NoneType, not a string",
        "line 5: a JSON list where an object is expected",
    ]
    with pytest.raises(UserError, match=r"a\.jsonl: 9 of 18 records are bad, .* allows 8 \(line 1"):
        _read(path, max_bad_lines=8)
    with pytest.raises(UserError, match="allows 0"):
        _read(path, max_bad_lines=0)


def test_five_percent_of_malformed_lines_pass_with_a_limit_of_six(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json.gz", prose(950), [b"{broken"] * 50)
    found, report = _read(path, max_bad_lines=0.06)
    assert len(found) == 950 and report.bad == 50
    with pytest.raises(UserError, match="50 of 1000 records are bad"):
        _read(path, max_bad_lines=0.04)


def test_a_hopeless_file_is_given_up_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalr.readers.documents.EARLY_CHECK", 100)
    monkeypatch.setattr("megalr.readers.documents.BATCH_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"not json\n" * 10_000)
    with pytest.raises(UserError, match=r"of 1\d\d records are bad"):
        _read(path)


def test_empty_documents_and_blank_lines_are_skipped_and_not_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": ""}\n{"text": " \\n"}\n{"text": "b"}'
    )
    found, report = _read(path)
    assert found == ["a", "b"]
    assert (report.records, report.bad, report.empty) == (4, 0, 2)


def test_null_and_invalid_values_of_a_parquet_column_are_bad_records(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", None, "", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found, report = _read(tmp_path / "a.parquet", max_bad_lines=1)
    assert found == ["a", "b"]
    assert (report.records, report.bad, report.empty) == (4, 1, 1)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body', it has \['text'\]"):
        _read(tmp_path / "a.parquet", text_key="body")


def test_plain_text_is_read_by_line_paragraph_or_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\n\nthree\n \nfour")
    assert _read(path)[0] == ["one\n", "two\n", "three\n", "four"]
    assert _read(path, text_documents="paragraph")[0] == ["one\ntwo", "three", "four"]
    assert _read(path, text_documents="file")[0] == ["one\ntwo\n\n\nthree\n \nfour"]


def test_parts_of_a_large_file_hold_every_line_once_wherever_the_cuts_fall(tmp_path: Path) -> None:
    texts = prose(40, longest=12)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    size = path.stat().st_size
    for split_bytes in [*range(7, 400, 13), size - 1, size]:
        parts = plan_splits([str(path)], split_bytes)
        found = []
        for part in parts.values():
            reader = DocumentReader(part, ReadOptions())
            found += [text for batch in reader for text in batch]
        assert found == texts
        assert len(parts) == -(-size // split_bytes)


def test_a_bad_line_of_a_later_part_says_where_the_part_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10 + b"broken\n")
    part = list(plan_splits([str(path)], 80).values())[1]
    reader = DocumentReader(part, ReadOptions(max_bad_lines=1))
    list(reader)
    assert reader.report.reasons == [
        f"line 5 after byte {part.start}: invalid JSON: Expecting value (column 1)"
    ]


def test_the_plan_names_missing_empty_and_unknown_inputs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    for pattern, message in [
        ("link.jsonl", "a link to .*gone.jsonl, which does not exist"),
        ("none*.jsonl", "no such input file"),
        ("empty.jsonl", "the file is empty"),
        ("a.docx", "unknown kind of input"),
        ("folder", "is a folder without a file of a known kind"),
    ]:
        with pytest.raises(UserError, match=message):
            plan_splits([str(tmp_path / pattern)], 1 << 30)


def test_a_link_and_a_name_with_brackets_are_files_by_their_own_name(tmp_path: Path) -> None:
    """The cache of the Hugging Face hub is links to files whose names say nothing."""
    blob = write_jsonl(tmp_path / "blobs" / "0a1b.json", prose(2))
    blob = blob.rename(blob.with_suffix(""))
    link = tmp_path / "c4.json"
    link.symlink_to(blob)
    for inputs in ([str(link)], [str(link), str(tmp_path / "*.json")]):
        assert [(n, p.file) for n, p in plan_splits(inputs, 1 << 30).items()] == [("c4", link)]
    other = tmp_path / "again.json"
    other.symlink_to(link)
    assert list(plan_splits([str(link), str(other)], 1 << 30)) == ["again"]  # read once
    brackets = write_jsonl(tmp_path / "a[1].json", prose(2))
    assert [part.file for part in plan_splits([str(brackets)], 1 << 30).values()] == [brackets]


def test_names_are_unique_and_do_not_depend_on_the_order_of_the_arguments(tmp_path: Path) -> None:
    paths = [
        str(write_jsonl(tmp_path / folder / "c4.00000.json.gz", prose(2)))
        for folder in ("en", "de")
    ]
    paths.append(str(write_jsonl(tmp_path / "big.jsonl", prose(50))))
    plan = plan_splits(paths, 1000)
    again = plan_splits([*reversed(paths), paths[0]], 1000)
    assert list(plan.items()) == list(again.items())
    names = list(plan)
    assert sum(name.startswith("c4.00000-") for name in names) == 2
    assert names[0] == f"big-part-00000-of-{len(plan) - 2:05d}"
    assert plan_splits([paths[0]], 1000).keys() == {"c4.00000"}


def test_a_hub_data_set_is_streamed_file_by_file(tmp_path: Path) -> None:
    """A folder of files opens the way a data set of the hub does."""
    texts = [prose(30, seed=n) for n in range(2)]
    for number, name in enumerate("ab"):
        write_jsonl(tmp_path / f"{name}.json.gz", texts[number])
    parts = plan_splits([f"hub:{tmp_path}"], 1 << 30)
    assert len(parts) == 2
    found = []
    for part in parts.values():
        found.append([t for batch in DocumentReader(part, ReadOptions()) for t in batch])
    assert found == texts


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"hub:allenai/c4: .*\(Couldn't reach .*local files"):
        plan_splits(["hub:allenai/c4"], 1 << 30)


TEXT_TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "string_view": pyarrow.string_view(),
    "binary_view": pyarrow.binary_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int16(), pyarrow.string()),
    "dictionary of large_string": pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
}


def _write_table(path: Path, column: pyarrow.Array) -> Path:
    table = pyarrow.table({"url": ["x"] * len(column), "text": column})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", TEXT_TYPES)
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_text_columns_of_every_arrow_type_are_read(tmp_path: Path, name: str, kind: str) -> None:
    texts = ["eins", None, "zwei é", "", "eins", "x" * 3000]
    encoded = [text if text is None else text.encode() for text in texts]
    column = pyarrow.array(texts, pyarrow.string())
    if "dictionary" in kind:
        column = column.dictionary_encode().cast(TEXT_TYPES[kind])
    else:
        column = pyarrow.array(encoded if "binary" in kind else texts, TEXT_TYPES[kind])
    path = _write_table(tmp_path / name, column)
    found, report = _read(path, max_bad_lines=1)
    assert found == ["eins", "zwei é", "eins", "x" * 3000]
    assert (report.records, report.bad, report.empty) == (6, 1, 1)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_invalid_utf8_in_a_column_is_one_bad_record(tmp_path: Path, name: str, kind: str) -> None:
    raw = pyarrow.array([b"one", b"\xe9t\xe9", b"two"])
    column = raw
    if kind != "binary":
        strings = pyarrow.StringArray.from_buffers(3, *raw.buffers()[1:])  # not checked by Arrow
        column = strings if kind == "string" else strings.cast(pyarrow.large_string())
    if kind == "dictionary":
        indices = pyarrow.array([0, 1, 2], pyarrow.int8())
        column = pyarrow.DictionaryArray.from_arrays(indices, column)
    path = _write_table(tmp_path / name, column)
    if (name, kind) == ("a.parquet", "dictionary"):  # Arrow itself refuses these
        with pytest.raises(UserError, match=r"a\.parquet: .*Invalid UTF8"):
            _read(path, max_bad_lines=1)
        return
    found, report = _read(path, max_bad_lines=1)
    assert found == ["one", "two"]
    assert report.reasons == ["line 2: invalid UTF-8 at byte 0 of 'text'"]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
def test_damaged_pages_of_a_sound_parquet_file_are_one_line(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": prose(2000)})
    pyarrow.parquet.write_table(table, path, compression=codec, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = b"\xff" * (len(content) // 2 - 100)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"a\.parquet: ") as caught:
        _read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 + len(str(path))


def test_a_zstandard_file_with_a_window_of_256_mib_is_read(tmp_path: Path) -> None:
    texts = prose(200)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size known
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(stream.compress(lines) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()[:18]).window_size == 1 << 28
    assert _read(path)[0] == texts
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc"  # as pzstd writes them
    path.write_bytes(skippable + path.read_bytes() + skippable)
    assert _read(path)[0] == texts


@pytest.mark.parametrize("name", ["A.JSONL", "A.JSON.GZ", "A.JSONL.ZST", "A.PARQUET"])
def test_upper_case_suffixes_mean_the_same(tmp_path: Path, name: str) -> None:
    lower = _write(tmp_path / name.lower(), prose(20))
    assert _read(lower.rename(tmp_path / name))[0] == prose(20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in ("a", "b")), encoding=encoding)
    with pytest.raises(UserError, match=rf"{name}: is UTF-(16|32) text, UTF-8 is expected"):
        _read(path, max_bad_lines=1000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([{"text": "a"}, {"text": "b"}]).encode(), "looks like a JSON array"),
        (json.dumps([{"text": "a"}], indent=1).encode(), "looks like a JSON array"),
        (json.dumps({"text": "a"}, indent=1).encode(), "JSON over several lines"),
        (gzip.compress(b'{"text": "a"}\n', mtime=0), "gzip data: add .gz"),
        (zstandard.compress(b'{"text": "a"}\n'), "zstandard data: add .zst"),
        (
            b'{"body": "a", "title": "b"}\n',
            "fields of the first such record are 'body', 'title'",
        ),
    ],
)
def test_the_likely_cause_of_many_bad_records_is_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jsonl: .*{message}"):
        _read(tmp_path / "a.jsonl")
