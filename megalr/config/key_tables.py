"""Every key of a run with its type, default and meaning, from the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megalr.config.methods import LrTransfer
from megalr.config.model import RopeScaling
from megalr.config.optimizers import LearningRateRatios, WeightDecayRatios
from megalr.config.problems import section_classes
from megalr.config.schema import DataSource, RunConfig


@dataclass(frozen=True)
class KeyRow:
    """One key.

    Attributes:
        key: dotted; in a table of items the bare name.
        type: words for the values allowed, choices in backquotes.
        default: as YAML writes it; None for a required key; "" for a key with a table of its own.
        meaning: one or more sentences.
        example: as YAML writes it; None without one.
    """

    key: str
    type: str
    default: str | None
    meaning: str
    example: str | None


@dataclass(frozen=True)
class KeyTable:
    """The keys of a section, or of one of its kinds, or of the mapping that a key holds.

    Attributes:
        place: the section, or the dotted key of the mapping.
        name: value of ``SECTION.name`` with which these keys exist; "" if they always do.
        items: whether ``place`` holds a list of such mappings.
        meaning: of the whole.
        rows: the keys.
    """

    place: str
    name: str
    items: bool
    meaning: str
    rows: tuple[KeyRow, ...]


def key_tables() -> list[KeyTable]:
    """All keys that a run may have, in the order of the schema."""
    tables = [
        _table(section, name, cls)
        for section in RunConfig.model_fields
        for name, cls in section_classes(RunConfig, section).items()
    ]
    tables.append(_table("model.rope_scaling", "", RopeScaling))
    tables.append(_table("method.lr_transfer", "", LrTransfer))
    tables.append(_table("optimizer.lr_ratio", "", LearningRateRatios))
    tables.append(_table("optimizer.weight_decay_ratio", "", WeightDecayRatios))
    return [*tables, _table("data.train", "", DataSource, items=True)]


def _table(place: str, name: str, cls: type[BaseModel], items: bool = False) -> KeyTable:
    schema = cls.model_json_schema()
    required = set(schema.get("required", ()))
    rows = []
    for field_name, field in cls.model_fields.items():
        default = None if field_name in required else yaml_text(field.default)
        if isinstance(field.default, BaseModel):
            default = ""
        rows.append(
            KeyRow(
                field_name if items else f"{place}.{field_name}",
                _type(schema["properties"][field_name], schema),
                default,
                " ".join((field.description or "").split()),
                yaml_text(field.examples[0]) if field.examples else None,
            )
        )
    return KeyTable(place, name, items, " ".join((cls.__doc__ or "").split()), tuple(rows))


def yaml_text(value: Any) -> str:
    """A default or example as one would write it behind ``section.key=``."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    names = {True: "true", False: "false", None: "null"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def _type(described: dict[str, Any], schema: dict[str, Any]) -> str:
    """Words for one property of a JSON schema, with its limits."""
    if "$ref" in described:
        return str(described["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in described:
        return " or ".join(_type(option, schema) for option in described["anyOf"])
    if "const" in described:
        return f"`{described['const']}`"
    if "enum" in described:
        return ", ".join(f"`{option}`" for option in described["enum"])
    kind = described.get("type", "value")
    if kind == "array":
        if "prefixItems" in described:
            return f"list of {len(described['prefixItems'])} numbers"
        return f"list of {_type(described.get('items', {}), schema)}"
    if kind == "object" and "additionalProperties" in described:
        return f"names with {_type(described['additionalProperties'], schema)} each"
    words = {"string": "text", "boolean": "true or false", "null": "null"}.get(kind, kind)
    limits = [
        f"{sign} {described[name]:g}"
        for name, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
        )
        if name in described
    ]
    return " ".join([words, *limits])
