"""Documents of an input split in batches of bounded size; bad records are counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megalr.errors import UserError
from megalr.files import sha256_of_file
from megalr.preprocessing.hub import hub_values
from megalr.preprocessing.input_splits import InputSplit, input_kind
from megalr.preprocessing.streams import HashingReader, damage_reported, decompressed

BATCH_BYTES = 1 << 20  # text of a batch; one longer document is a batch by itself
REASONS_KEPT = 5  # bad records described in full per file
PARQUET_ROWS = 256  # rows read at a time
EARLY_CHECK = 10_000  # records after which too many bad ones end the file early
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ReadOptions:
    """text_key: field or column with the text. text_documents: one document of a ``.txt`` file is a
    line, a paragraph (separated by blank lines) or the whole file. max_bad_lines: bad records
    allowed per input split, a number from 1 on or a fraction below 1."""

    text_key: str = "text"
    text_documents: str = "line"
    max_bad_lines: float = 0.01


@dataclass
class ReadReport:
    """Counts so far: bytes of the input file, records, and skipped records."""

    input_bytes: int = 0
    records: int = 0
    bad: int = 0
    empty: int = 0
    reasons: list[str] = field(default_factory=list)
    sha256: str = ""


class _BadRecord(Exception):
    """Why a record has no usable text."""


def _checked(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise _BadRecord(f"'{text_key}' is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRecord(f"'{text_key}' holds a lone surrogate, which is no Unicode text") from None
    return text


def _parse_json(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord(f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise _BadRecord(f"invalid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise _BadRecord("invalid JSON: nested too deeply") from None
    except ValueError:
        raise _BadRecord("invalid JSON: a number with thousands of digits") from None
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {type(record).__name__} where an object is expected")
    if text_key not in record:
        raise _BadRecord(f"no field '{text_key}'")
    return _checked(record[text_key], text_key)


def _parse_text(line: bytes, _: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecord(f"invalid UTF-8 at byte {error.start}") from None


class DocumentReader:
    """Iterates over lists of documents of one input split; ``report`` grows while reading.

    Memory: one batch (1 MiB of text) or the longest single record. Raises UserError for a damaged
    file and as soon as more records are bad than allowed.
    """

    def __init__(
        self, input_split: InputSplit, options: ReadOptions, report: ReadReport | None = None
    ) -> None:
        self.input_split, self.options = input_split, options
        self.report = report or ReadReport()

    def __iter__(self) -> Iterator[list[str]]:
        if self.input_split.unit == "hub":
            yield from self._texts(
                hub_values(
                    str(self.input_split.file),
                    self.input_split.number,
                    self.input_split.count,
                    self.options.text_key,
                ),
                _checked,
            )
            self._check_bad(at_end=True)
            return
        kind = input_kind(self.input_split.file)
        with damage_reported(self.input_split.file):
            if kind == "parquet":
                yield from self._texts(self._parquet_values(), _checked)
            else:
                parse = _parse_json if kind == "json" else _parse_text
                yield from self._texts(self._line_batches(kind), parse)
        self._check_bad(at_end=True)

    def _texts(
        self, batches: Iterable[Sequence[Any]], parse: Callable[[Any, str], str]
    ) -> Iterator[list[str]]:
        """Documents among records; bad and empty ones are counted, blank lines are not."""
        number = 0
        for records in batches:
            texts = []
            for record in records:
                number += 1
                if isinstance(record, bytes):
                    if number == 1 and self.input_split.start == 0:
                        record = record.removeprefix(BYTE_ORDER_MARK)
                    if not record.strip():
                        continue
                self.report.records += 1
                try:
                    text = parse(record, self.options.text_key)
                except _BadRecord as error:
                    self._bad(number, str(error))
                    continue
                if text.strip():
                    texts.append(text)
                else:
                    self.report.empty += 1
            self._check_bad()
            if texts:
                yield texts

    def _line_batches(self, kind: str) -> Iterator[list[bytes]]:
        if self.input_split.unit == "bytes":
            yield from self._lines_of_range()
            return
        path = self.input_split.file
        with HashingReader(path) as raw, decompressed(raw, path) as stream:
            style = self.options.text_documents if kind == "text" else "line"
            for records in _RECORDS[style](stream):
                self.report.input_bytes = raw.bytes_read
                yield records
            self.report.sha256 = raw.finish()
            self.report.input_bytes = raw.bytes_read

    def _lines_of_range(self) -> Iterator[list[bytes]]:
        """Lines whose first byte lies in ``[start, stop)`` of an uncompressed file."""
        digest = hashlib.sha256()
        with open(self.input_split.file, "rb", buffering=BATCH_BYTES) as stream:
            position = self.input_split.start
            if position:
                stream.seek(position - 1)
                position += len(stream.readline()) - 1  # this line belongs to the split before
            while position < self.input_split.stop:
                lines: list[bytes] = []
                end = min(position + BATCH_BYTES, self.input_split.stop)
                while position < end and (line := stream.readline()):
                    lines.append(line)
                    position += len(line)
                if not lines:
                    break
                digest.update(b"".join(lines))
                self.report.input_bytes += sum(map(len, lines))
                yield lines
        self.report.sha256 = digest.hexdigest()

    def _parquet_values(self) -> Iterator[list[object]]:
        import pyarrow
        from pyarrow import parquet

        path, key = self.input_split.file, self.options.text_key
        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: damaged or not a parquet file ({error})") from None
        with file:
            if key not in file.schema_arrow.names:
                raise UserError(
                    f"{path}: no column '{key}', it has {file.schema_arrow.names}; choose one "
                    f"with --text_key"
                )
            for batch in file.iter_batches(PARQUET_ROWS, columns=[key]):
                yield batch.column(0).to_pylist()
        self.report.sha256 = sha256_of_file(path)

    def _bad(self, number: int, reason: str) -> None:
        self.report.bad += 1
        if len(self.report.reasons) < REASONS_KEPT:
            where = f" after byte {self.input_split.start}" if self.input_split.start else ""
            self.report.reasons.append(f"line {number}{where}: {reason}")

    def _check_bad(self, at_end: bool = False) -> None:
        report, limit = self.report, self.options.max_bad_lines
        if not at_end and report.records < EARLY_CHECK and limit < 1:
            return
        allowed = limit if limit >= 1 or limit == 0 else limit * report.records
        if report.bad > allowed:
            raise UserError(
                f"{self.input_split.file}: {report.bad} of {report.records} records are bad, "
                f"--max_bad_lines allows {allowed:.0f} ({'; '.join(report.reasons)})"
            )


def _by_line(stream: BinaryIO) -> Iterator[list[bytes]]:
    while lines := stream.readlines(BATCH_BYTES):
        yield lines


def _by_paragraph(stream: BinaryIO) -> Iterator[list[bytes]]:
    paragraph: list[bytes] = []
    for lines in _by_line(stream):
        finished = []
        for line in lines:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                finished.append(b"".join(paragraph).strip(b"\r\n"))
                paragraph = []
        if finished:
            yield finished
    if paragraph:
        yield [b"".join(paragraph).strip(b"\r\n")]


def _whole(stream: BinaryIO) -> Iterator[list[bytes]]:
    content = stream.read()
    if content:
        yield [content]


_RECORDS = {"line": _by_line, "paragraph": _by_paragraph, "file": _whole}
