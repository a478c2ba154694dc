"""How much memory tensors take on a CPU at one time, where there is no allocator to ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in storages that were made inside and are alive.

    ``with LiveBytes() as live: ...`` counts after every operator, ``live.peak`` is the largest
    count. What an operator needs for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            key = storage._cdata
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))
        storages = [found for ref in list(self._alive.values()) if (found := ref()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages))
        return result
