"""Base class and shared field types of the configuration's sections."""

from __future__ import annotations

import os.path
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A section of the configuration: frozen, strict about types, no keys but the declared ones.

    Strict means that nothing is converted: ``"5"`` and ``5.0`` are not integers, ``1`` is not a
    boolean. The one exception is an integer given for a float.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_list_as_tuple)
"""Marks a tuple field so that a YAML list is accepted despite strict types."""

Folder = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path. A leading ~ is expanded here: the shell does not do it in YAML or after ``key=``."""


def split_fork(text: str) -> tuple[str, int | None]:
    """Folder and update of ``FOLDER@UPDATE``; the update is None for ``FOLDER`` alone."""
    found = re.fullmatch(r"(.+)@(?:update_)?([0-9]{1,15})", text)
    return (text, None) if found is None else (found[1], int(found[2]))


Betas = Annotated[tuple[float, float], AsTuple]
"""Adam's two decay rates."""
