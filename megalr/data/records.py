"""Records of JSON files, read with limits and with their types and ranges checked."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Hashable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from megalr.errors import UserError

Record = TypeVar("Record")
LARGEST_JSON = 256 << 20  # bytes; a shard takes about 700 in a manifest
CHECKSUM_KEY = "sha256"
VALUE_SHOWN = 60  # characters of a wrong value
EXACT = ConfigDict(extra="forbid")
"""For ``__pydantic_config__`` of a dataclass: unknown keys are errors."""


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("a path inside the folder is expected")
    return path


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a string is expected")
    return value


FileName = Annotated[str, PlainValidator(_string)]  # may hold bytes that are no UTF-8
Text = Annotated[str, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Flag = Annotated[bool, Field(strict=True)]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
OptionalSha256 = Annotated[str, Field(strict=True, pattern=r"^([0-9a-f]{64})?$")]
InnerPath = Annotated[Text, AfterValidator(_inside)]


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


def parse_record(kind: type[Record], content: Any, place: str) -> Record:
    """Parsed JSON as the dataclass ``kind``; UserError with ``place``, key and value if it is not.

    The dataclass's annotations say types and ranges; they are applied without conversions of
    scalars (``"3"`` and ``3.0`` are no int).
    """
    try:
        result: Record = _adapter(cast(Hashable, kind)).validate_python(content)
        return result
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = _key(first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        where, _, name = key.rpartition(": ")
        problem = f"{where}: unknown key '{name}'" if where else f"unknown key '{name}'"
    elif first["type"] in ("missing", "missing_argument"):
        problem = f"{key} is missing; the file is incomplete"
    else:
        value = repr(first["input"])
        shown = value if len(value) <= VALUE_SHOWN else f"{value[:VALUE_SHOWN]}..."
        problem = f"{key or 'the file'} is {shown}: {first['msg'].lower()}"
    raise UserError(f"{place}: {problem}")


def _key(location: tuple[str | int, ...]) -> str:
    """``("shards", 0, "tokens")`` as ``shard 0: tokens``."""
    words: list[str] = []
    for item in location:
        if isinstance(item, int) and words:
            words[-1] = f"{words[-1].removesuffix('s')} {item}"
        else:
            words.append(str(item))
    return ": ".join(words)


def read_json(path: Path) -> Any:
    """Parsed JSON of a file, or a UserError with the place of the mistake."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{path}: {size} bytes, at most {LARGEST_JSON} are read")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path}: damaged JSON, it is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of 4,300 digits
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged") from None


def record_checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys and its white space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def take_checksum(content: Any) -> bool:
    """Remove an object's own checksum; whether it matches. Older versions wrote none."""
    expected = content.pop(CHECKSUM_KEY, None) if isinstance(content, dict) else None
    return expected is None or expected == record_checksum(content)
