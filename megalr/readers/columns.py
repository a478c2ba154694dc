"""The text column of Parquet and Arrow files, as bytes or other Python values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalr.errors import UserError

ROWS = 256  # rows handled at a time
BYTES_OF = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}
FEATHER_MAGIC = b"ARROW1"  # of Arrow's file format; its stream format has no magic


def parquet_values(path: Path, key: str) -> Iterator[list[object]]:
    """Values of column ``key`` of a Parquet file, in lists; Arrow's exceptions on damage."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(path, key, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS, columns=[key]):
            yield _as_bytes(batch.column(0)).to_pylist()


def arrow_values(path: Path, key: str) -> Iterator[list[object]]:
    """Values of column ``key`` of an Arrow file (stream or file format), in lists."""
    import pyarrow

    with pyarrow.OSFile(str(path), "rb") as source:
        if source.read(len(FEATHER_MAGIC)) == FEATHER_MAGIC:
            file = pyarrow.ipc.open_file(source)
            batches: Any = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            source.seek(0)
            file = batches = pyarrow.ipc.open_stream(source)
        _check_column(path, key, file.schema.names)
        for batch in batches:
            column = _as_bytes(batch.column(key))
            for start in range(0, len(column), ROWS):
                yield column.slice(start, ROWS).to_pylist()


def _check_column(path: Path, key: str, names: list[str]) -> None:
    if names.count(key) != 1:
        found = "no" if key not in names else f"{names.count(key)} times"
        raise UserError(
            f"{path}: {found} column '{key}', it has {names}; choose one with --text_key"
        )


def _as_bytes(column: Any) -> Any:
    """Text as bytes, so that one invalid character costs one record; other types as they are.

    Arrow checks neither offsets nor dictionary indices on reading; here they are checked.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        words = _as_bytes(column.dictionary)
        return pyarrow.DictionaryArray.from_arrays(column.indices, words).dictionary_decode()
    column.validate()
    if (name := str(column.type)) in BYTES_OF:  # without a copy, so before the full check
        column = column.view(getattr(pyarrow, BYTES_OF[name])())
    column.validate(full=True)
    return column.cast(pyarrow.large_binary()) if name.endswith("_view") else column
