"""Random damage to bytes and to parsed JSON, the same for the same seed."""

from __future__ import annotations

import copy
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 65_535, 65_536, 2**31, 2**63, 2**64, -(2**63), 10**30,
    0.0, 1.0, -0.5, 1e308, float("inf"), float("nan"), "", "0", "1", "x", "../x", "/etc/passwd",
    "\0", "\ud800", "a" * 64, "é" * 300, [], [0], [[]], {}, {"a": 1}, [None], {"": {}},
)  # fmt: skip


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """A copy with one to four bits flipped, ranges overwritten, removed, repeated, or cut off."""
    choose = random.Random(seed)
    data = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        start = choose.randrange(len(data) + 1)
        length = choose.choice((1, 2, 4, 8, 100))
        kind = choose.choice(("flip", "set", "remove", "repeat", "insert", "cut"))
        if kind == "flip" and start < len(data):
            data[start] ^= 1 << choose.randrange(8)
        elif kind == "set":
            end = min(start + length, len(data))
            data[start:end] = bytes([choose.choice((0, 255, 127))]) * (end - start)
        elif kind == "remove":
            del data[start : start + length]
        elif kind == "repeat":
            data[start:start] = data[start : start + length]
        elif kind == "insert":
            data[start:start] = choose.randbytes(length)
        elif choose.random() < 0.3:
            del data[start:]
    return bytes(data)


def mutated_json(content: Any, seed: int) -> Any:
    """A copy with one value replaced, removed, renamed, repeated or exchanged."""
    choose = random.Random(seed)
    result = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []
    _collect(result, places)
    parent, key = choose.choice(places)
    kind = choose.choice(("replace", "replace", "replace", "remove", "rename", "swap", "nudge"))
    if kind == "remove":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[choose.choice(("", "x", f"{key}s", str(key).upper()))] = parent.pop(key)
    elif kind == "swap":
        other, place = choose.choice(places)
        parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
    elif kind == "nudge" and type(parent[key]) is int:
        parent[key] += choose.choice((-1, 1, 256))
    else:
        parent[key] = copy.deepcopy(choose.choice(VALUES))
    return result


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        places.append((node, key))
        if isinstance(value, dict | list):
            _collect(value, places)
