"""Messages for pydantic's errors: the value seen, the values allowed, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

MAX_VALUE_LENGTH = 80


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most similar to ``word``, or None when none is similar."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def printable(key: str) -> str:
    """A key as text of one line and bounded length."""
    return key if key.isprintable() and len(key) <= MAX_VALUE_LENGTH else shown(key)


def shown(value: Any) -> str:
    """The value as text of bounded length, constants as YAML and JSON write them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."


def section_classes(root: type[BaseModel], section: str) -> dict[str, type[BaseModel]]:
    """The classes that a section may have, by ``name`` (by "" when the section has but one)."""
    if section not in root.model_fields:
        return {}
    annotation = root.model_fields[section].annotation
    classes = get_args(annotation) or (annotation,)
    if len(classes) == 1:
        return {"": classes[0]}
    return {get_args(c.model_fields["name"].annotation)[0]: c for c in classes}


def known_keys(root: type[BaseModel]) -> list[str]:
    """Every dotted key that some run may have."""
    keys: dict[str, None] = {}
    for section in root.model_fields:
        for cls in section_classes(root, section).values():
            keys.update(dict.fromkeys(f"{section}.{name}" for name in cls.model_fields))
    return list(keys)


def dotted_key(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The key as the user writes it: without the name of the union member that pydantic inserts."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[1] in section_classes(root, parts[0]):
        del parts[1]
    return ".".join(parts)


def describe(root: type[BaseModel], error: ErrorDetails, values: dict[str, Any]) -> str:
    """ " = value: what would be right", to be put behind the key; for one error of pydantic."""
    kind, location = error["type"], error["loc"]
    if kind == "missing":
        return ": required, but not given" + _meaning(root, location)
    if kind == "extra_forbidden":
        return f" = {_unknown_key(root, location, error['input'])}"
    if kind == "union_tag_invalid":
        section = str(location[0])
        return f" = {_not_one_of(values[section]['name'], section_classes(root, section))}"
    if kind == "literal_error":
        return f" = {_not_one_of(error['input'], _literals(error))}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f" = {shown(error['input'])}: must be a section with keys of its own"
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        return f" = {shown(error['input'])}: must have at least {least} item{'s'[: least - 1]}"
    text = error["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "must be").replace("should have", "must have")
    return f" = {shown(error['input'])}: {text[0].lower()}{text[1:]}"


def _literals(error: ErrorDetails) -> list[str]:
    expected = str(error.get("ctx", {}).get("expected", ""))
    return [part.strip().strip("'") for part in expected.replace(" or ", ",").split(",")]


def _not_one_of(value: Any, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    close = nearest(str(value), allowed)
    hint = f"; did you mean {close}?" if close else ""
    return f"{shown(value)}: must be one of {', '.join(allowed)}{hint}"


def _meaning(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in location]
    classes = section_classes(root, parts[0])
    cls = classes.get(parts[1] if len(classes) > 1 else "")
    info = cls.model_fields.get(parts[-1]) if cls else None
    if info is None or not info.description:
        return ""
    sentence = " ".join(info.description.split()).split(". ")[0].rstrip(".")
    example = f"; for example {info.examples[0]}" if info.examples else ""
    return f" ({sentence}{example})"


def _unknown_key(root: type[BaseModel], location: tuple[int | str, ...], value: Any) -> str:
    parts = [str(part) for part in location]
    classes = section_classes(root, parts[0]) if len(parts) > 1 else {}
    member = parts[1] if len(classes) > 1 else ""
    if len(parts) == 1:
        names = list(root.model_fields)
        where = "the sections are"
    elif len(parts) == (3 if member else 2):
        names = list(classes[member].model_fields)
        where = f"the keys of {parts[0]}{' ' + member if member else ''} are"
    else:
        return f"{shown(value)}: unknown key"
    close = _nearest_key(parts, names, root)
    hint = f"did you mean {close}? " if close else ""
    return f"{shown(value)}: unknown key; {hint}({where} {', '.join(names)})"


def _nearest_key(parts: list[str], siblings: list[str], root: type[BaseModel]) -> str | None:
    """Best key for the unknown one: a similar sibling, else the same name in another section."""
    close = nearest(parts[-1], siblings)
    if close:
        return close if len(parts) == 1 else f"{parts[0]}.{close}"
    for key in known_keys(root):
        section, name = key.split(".")
        if name == parts[-1] and (len(parts) == 1 or section != parts[0]):
            return key
    return None


def keys_of_no_member(root: type[BaseModel], section: str, values: dict[str, Any]) -> list[str]:
    """Keys of a section that none of its possible classes has, whatever its ``name``."""
    known = {name for cls in section_classes(root, section).values() for name in cls.model_fields}
    return [f"{section}.{key}" for key in values[section] if key not in known]
