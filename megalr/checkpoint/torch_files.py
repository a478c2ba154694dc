"""Memory-map files written by ``torch.save`` without executing code in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megalr.checkpoint.manifest import Damaged


def load_mapped(path: Path) -> Any:
    """Open a file written by ``torch.save``; tensors stay on the disk until they are used.

    Accepts only tensors, plain values and the three plain classes that DeepSpeed writes.

    Raises:
        Damaged: it is not such a file.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def follow(values: Any, keys: list[Any]) -> Any:
    """The value at a path of keys; None if a key is missing."""
    for key in keys:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list | tuple) and 0 <= key < len(values):
            values = values[key]
        else:
            return None
    return values
