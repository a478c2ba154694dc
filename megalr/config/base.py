"""What every section of a run's configuration has in common."""

from __future__ import annotations

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A section of the configuration: frozen, strict about types, no keys but the declared ones.

    Strict means that nothing is converted behind the user's back: ``"5"`` and ``5.0`` are no
    integers, ``1`` is no boolean. The one exception is an integer given for a float.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_list_as_tuple)

Folder = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; the shell expands a leading ~ neither in YAML nor behind ``key=``, so it is done here."""
"""Marks a tuple field so that a YAML list is accepted in spite of strict types."""

Betas = Annotated[tuple[float, float], AsTuple]
