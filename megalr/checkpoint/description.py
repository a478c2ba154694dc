"""The description of one rank's files (``fragments_*.pt``), read with its types checked.

Written by :func:`megalr.engine.checkpoint_files.describe`, which says what the entries mean.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from megalr.checkpoint.manifest import Damaged, first_problem
from megalr.checkpoint.torch_files import load_mapped
from megalr.sharding.tensor_shard import TensorShard

FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Pair = Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)]
Place = Annotated[tuple[FileName, list[str | int]], Field(strict=False)]


class _Flat(BaseModel, strict=True):
    numel: NonNegativeInt
    master: Place
    state: Place | None
    tensors: list[str]


class _Shard(BaseModel, strict=True):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    full_shape: list[NonNegativeInt]
    rows: list[Pair] | None
    columns: Pair | None
    indices: Tensor | None


class _Parameter(BaseModel, strict=True):
    shape: list[NonNegativeInt]
    shard: _Shard | None
    trained: bool
    piece: Annotated[list[NonNegativeInt], Field(min_length=4, max_length=4)] | None


class _Description(BaseModel, strict=True):
    flats: list[_Flat]
    parameters: dict[str, _Parameter]
    per_tensor_states: list[str]
    cuts: dict[str, Literal[0, 1]] = {}
    matrix_elements: list[str] = []


def read_description(path: Path) -> dict[str, Any]:
    """The description in a file; plain values.

    Raises:
        Damaged: it cannot be read, or an entry has another type or lies outside of its tensor.
    """
    content = load_mapped(path)
    try:
        checked = _Description.model_validate(content)
    except ValidationError as error:
        raise Damaged(f"{path.name}: {first_problem(error)}") from error
    for name, parameter in checked.parameters.items():
        problem = _outside(parameter, checked.flats)
        if problem is not None:
            raise Damaged(f"{path.name}: {name}: {problem}")
    return {"cuts": checked.cuts, "matrix_elements": checked.matrix_elements, **content}


def _outside(parameter: _Parameter, flats: list[_Flat]) -> str | None:
    """The part of a record that contradicts another one; None if there is none."""
    numel = math.prod(parameter.shape)
    if parameter.shard is not None:
        shard = TensorShard.from_dict(dict(parameter.shard))
        ranges = [*(shard.rows or ()), *((shard.columns,) if shard.columns else ())]
        dimensions = len(shard.full_shape)
        if dimensions < (1 if shard.columns is None else 2):
            return f"the whole shape {list(shard.full_shape)} has too few dimensions"
        if any(stop < start for start, stop in ranges) or math.prod(shard.local_shape) != numel:
            return f"shape {parameter.shape} is not that of its shard"
    if parameter.piece is None:
        return None
    flat, offset, start, count = parameter.piece
    if flat >= len(flats):
        return f"it lies in flat tensor {flat} of {len(flats)}"
    if offset + count > flats[flat].numel or start + count > numel:
        return f"piece {parameter.piece} lies outside of its tensors"
    return None
