"""Memory-map files written by ``torch.save`` without executing code in them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from megalr.checkpoint.manifest import Damaged
from megalr.engine.checkpoint_files import unpickle

_FOREIGN_CLASS = re.compile(r"GLOBAL ([\w.]+)")


def load_mapped(path: Path) -> Any:
    """Open a file written by ``torch.save``; tensors stay on the disk until they are used.

    Accepts only tensors, plain values and the plain classes that DeepSpeed writes.

    Raises:
        Damaged: it is not such a file.
    """
    try:
        return unpickle(path, mmap=True)
    except pickle.UnpicklingError as error:
        found = _FOREIGN_CLASS.search(str(error))
        reason = (
            f"holds {found[1]}, which is neither a tensor nor a plain value; not loaded because "
            "that could run code"
            if found
            else "is not a file of tensors"
        )
        raise Damaged(f"{path.name} {reason}") from error
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"{path.name} cannot be read: {reason}") from error


def follow(values: Any, keys: list[Any]) -> Any:
    """The value at a path of keys; None if a key is missing."""
    for key in keys:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list | tuple) and key in range(len(values)):
            values = values[key]
        else:
            return None
    return values
