"""torch's files of pickled tensors: read without running code in them, written with plain errors.

DeepSpeed reads its files by ``torch.load(weights_only=False)``, which would run whatever somebody
has planted in a checkpoint.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def unpickle(path: Path | str, mmap: bool = False) -> Any:
    """Read a file written by ``torch.save`` to the CPU.

    Accepts only tensors, plain values and the three plain classes that DeepSpeed writes.

    Args:
        path: the file.
        mmap: leave tensors on the disk until they are used, except in torch's legacy format. A
            mapping keeps the space of a deleted file allocated, so do not map tensors that are
            kept.

    Raises:
        pickle.UnpicklingError: the file holds something else.
        OSError, RuntimeError, EOFError, ValueError: it cannot be read.
    """
    # Reading a checkpoint without an engine does not import DeepSpeed before the first file.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    mmap = mmap and zipfile.is_zipfile(path)
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def write_tensors(value: Any, path: Path) -> None:
    """``torch.save``; a failure to write is an OSError.

    Raises:
        OSError: the system refused (disk full, no permission).
    """
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise system_error(error, path) from error


def system_error(error: Exception, path: Path | str) -> Exception:
    """The system's reason for a failed write of ``path``; ``error`` itself if none shows.

    torch's writer reports a full disk as "unexpected pos 576 vs 534". Writing on to the unusable
    file meets the same reason again.
    """
    if isinstance(error, OSError):
        return error
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found
    return error
