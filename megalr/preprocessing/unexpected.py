"""Hints at the cause when a text file is not in the expected format."""

from __future__ import annotations

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MAGICS = {
    b"\x1f\x8b": "gzip data: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "zstandard data: add .zst to its name",
    b"PAR1": "a Parquet file: name it .parquet",
    b"ARROW1": "an Arrow file: name it .arrow",
    b"BZh": "bzip2 data: decompress it first",
    b"\xfd7zXZ": "xz data: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
}
_NUL_SHARE = 0.2  # of the bytes of Latin text in UTF-16 one half, in UTF-8 none


def foreign_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 if a file beginning with ``head`` is in that encoding; else None."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    return "UTF-16" if head.count(0) > _NUL_SHARE * len(head) else None


def likely_format(head: bytes) -> str | None:
    """The format of a file beginning with ``head`` that is no JSON lines, and what to do."""
    for magic, meaning in _MAGICS.items():
        if head.startswith(magic):
            return meaning
    start = head.strip()
    if start.startswith(b"["):
        return "a JSON array: write one object per line (jq -c '.[]')"
    if start == b"{":
        return "JSON over several lines: write one object per line (jq -c .)"
    return None
