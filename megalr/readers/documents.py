"""Documents of an input split in batches of bounded size; bad records are counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megalr.data.records import EXACT, Count, FileName, OptionalSha256
from megalr.errors import UserError
from megalr.files import sha256_of_file
from megalr.readers.columns import arrow_values, parquet_values
from megalr.readers.hub import hub_rows
from megalr.readers.input_splits import InputSplit, input_kind
from megalr.readers.streams import (
    HashingReader,
    damage_reported,
    decompressed,
    foreign_encoding,
    likely_format,
)

BATCH_BYTES = 1 << 20  # text of a batch; one longer document is a batch by itself
FIELDS_SHOWN = 20
REASONS_KEPT = 5  # bad records described in full per file
EARLY_CHECK = 10_000  # records after which too many bad ones end the file early
HEAD_BYTES = 4096  # of the first record, kept to explain why a file cannot be read
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

    __pydantic_config__ = EXACT
    input_bytes: Count = 0
    records: Count = 0
    bad: Count = 0
    empty: Count = 0
    reasons: list[FileName] = field(default_factory=list)
    sha256: OptionalSha256 = ""


class _BadRecord(Exception):
    """Why a record has no usable text; ``fields``: those of a record without the text field."""

    def __init__(self, reason: str, fields: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.fields = list(fields)


def _checked(text: object, text_key: str) -> str:
    if isinstance(text, bytes):
        return _decoded(text, f"of '{text_key}'")
    if not isinstance(text, str):
        raise _BadRecord(f"'{text_key}' is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRecord(f"'{text_key}' holds a lone surrogate, which is no Unicode text") from None
    return text


def _decoded(text: bytes, where: str = "") -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecord(f"invalid UTF-8 at byte {error.start} {where}".rstrip()) from None


def _text_of(record: object, text_key: str) -> str:
    """The text of a record with fields: parsed JSON or a row of the hub."""
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {type(record).__name__} where an object is expected")
    if text_key not in record:
        raise _BadRecord(f"no field '{text_key}'", list(record))
    return _checked(record[text_key], text_key)


def _parse_json(line: bytes, text_key: str) -> str:
    text = _decoded(line, "of the line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRecord(f"invalid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise _BadRecord("invalid JSON: nested too deeply") from None
    except ValueError:
        raise _BadRecord("invalid JSON: a number with thousands of digits") from None
    return _text_of(record, text_key)


def _parse_text(line: bytes, _: str) -> str:
    return _decoded(line)


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
        self._head = b""
        self._fields: list[str] = []

    def __iter__(self) -> Iterator[list[str]]:
        source, key = self.input_split, self.options.text_key
        if source.unit == "hub":
            rows = hub_rows(str(source.file), source.number, source.count)
            yield from self._texts(rows, _text_of)
            self._check_bad(at_end=True)
            return
        kind = input_kind(source.file)
        with damage_reported(source.file):
            if kind in ("parquet", "arrow"):
                read = parquet_values if kind == "parquet" else arrow_values
                yield from self._texts(read(source.file, key), _checked)
                self.report.sha256 = sha256_of_file(source.file)
            else:
                parse = _parse_json if kind == "json" else _parse_text
                records = self._check_encoding(self._line_batches(kind))
                yield from self._texts(records, parse, lines=True)
        self._check_bad(at_end=True)

    def _check_encoding(self, batches: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        """The batches; UserError if the file is in another encoding than UTF-8."""
        for batch in batches:
            if not self._head and batch and self.input_split.start == 0:
                self._head = batch[0][:HEAD_BYTES].removeprefix(BYTE_ORDER_MARK)
                if encoding := foreign_encoding(self._head):
                    raise UserError(
                        f"{self.input_split.file}: is {encoding} text, UTF-8 is expected; convert "
                        f"it (iconv -f {encoding} -t UTF-8)"
                    )
            yield batch

    def _texts(
        self,
        batches: Iterable[Sequence[Any]],
        parse: Callable[[Any, str], str],
        lines: bool = False,
    ) -> Iterator[list[str]]:
        """Documents among records; bad and empty ones are counted, blank ``lines`` are not."""
        number = 0
        for records in batches:
            texts = []
            for record in records:
                number += 1
                if lines:
                    if number == 1 and self.input_split.start == 0:
                        record = record.removeprefix(BYTE_ORDER_MARK)
                    if not record.strip():
                        continue
                self.report.records += 1
                try:
                    text = parse(record, self.options.text_key)
                except _BadRecord as error:
                    self._bad(number, str(error))
                    self._fields = self._fields or error.fields
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
                f"--max_bad_lines allows {allowed:.0f} ({'; '.join(report.reasons)}){self._hint()}"
            )

    def _hint(self) -> str:
        """The likely cause of many bad records, for the end of an error message."""
        if found := likely_format(self._head):
            return f"; the file looks like {found}"
        if self._fields:
            shown = ", ".join(map(repr, self._fields[:FIELDS_SHOWN]))
            return f"; the fields of the first such record are {shown}: choose one with --text_key"
        return ""


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
