"""How much memory tensors take on a CPU at one time, where there is no allocator to ask."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in storages that were made inside and are alive.

    ``with LiveBytes() as live: ...`` counts after every operator, ``live.peak`` is the largest
    count. What an operator needs for itself is not seen. What a gloo thread holds for a moment
    after a collective does not count: before a larger count is kept, the threads may release it.
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
        if self._count() > self.peak:
            time.sleep(0.001)
            self.peak = max(self.peak, self._count())
        return result

    def _count(self) -> int:
        storages = [found for ref in list(self._alive.values()) if (found := ref()) is not None]
        return sum(storage.nbytes() for storage in storages)
