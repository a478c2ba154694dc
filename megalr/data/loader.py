"""Batches for training and evaluation, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megalr.data.dataset import NO_TARGET, TokenDataset
from megalr.errors import UserError

MicroBatch = tuple[torch.Tensor, ...]
"""input_ids, labels, both int64 (b, S); with document masks also positions, int32 (b, S)."""

STOP_POLL_SECONDS = 0.2
SAMPLES_PLANNED = 1 << 16  # samples whose order is computed in one call
SAMPLES_AT_ONCE = 1 << 20  # samples whose targets are counted in one call


_TORCH: dict[type, torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32}


def _padding(dataset: TokenDataset, rows: int) -> MicroBatch:
    """A micro-batch without targets; of one document a row."""
    shape = (rows, dataset.sequence_length)
    input_ids = torch.full(shape, dataset.pad_id, dtype=torch.int64)
    labels = torch.full(shape, NO_TARGET, dtype=torch.int64)
    if not dataset.document_mask:
        return input_ids, labels
    return input_ids, labels, torch.arange(shape[1], dtype=torch.int32).repeat(rows, 1)


@dataclass(frozen=True)
class UpdateBatch:
    """The micro-batches of one rank for one optimizer update.

    micro_batches: (input_ids, labels), both int64 (b, S); ``labels[:, t]`` is the target of
    position t, -100 where there is none. Of a data set with document masks (input_ids, labels,
    positions): places of the tokens within their documents, int32 (b, S). num_targets: targets of
    the *global* batch, all ranks and micro-batches. samples_by_source: samples of the global batch
    from each source of the data set. error: why the batch could not be read; it then holds padding
    without targets, and the update must be skipped (see ``defer_errors``).
    """

    update: int
    micro_batches: list[MicroBatch]
    num_targets: int
    samples_by_source: tuple[int, ...]
    error: UserError | None = None


class UpdateLoader:
    """An endless iterator over the UpdateBatch of update ``start_update``, the next one, ...

    The global batch of update u holds the samples at positions ``u G .. u G + G - 1`` of the data
    set's order: a function of (seed, u) alone. Micro-batch m of rank r takes the positions
    ``(m world_size + r) b + j``. ``rank`` and ``world_size`` count data-parallel ranks.

    ``prefetch_updates`` updates are read ahead by a thread (0: no thread, ``next()`` reads);
    an error there is raised by the next ``next()``. Close it, or use it in a ``with``.

    ``defer_errors``: a UserError while reading is kept in :attr:`error` and in the batches from
    there on instead of being raised, so that a rank that cannot read still takes part in the
    collectives until all ranks know.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_update: int = 0,
        prefetch_updates: int = 2,
        pin_memory: bool = False,
        defer_errors: bool = False,
    ) -> None:
        if micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"a global batch of {global_batch_size} sequences cannot be divided into "
                f"micro-batches of {micro_batch_size} on {world_size} data-parallel ranks; "
                f"make it a multiple of {micro_batch_size * world_size}"
            )
        self._dataset, self._seed, self._pin_memory = dataset, seed, pin_memory
        self._global_batch_size = global_batch_size
        positions = np.arange(global_batch_size).reshape(-1, world_size, micro_batch_size)
        self._mine = positions[:, rank].ravel()
        self._micro_batch_size = micro_batch_size
        self._planned_from = 0
        self._planned_targets = np.empty(0, np.int64)
        self._prefetch_updates, self._defer_errors = prefetch_updates, defer_errors
        self.error: UserError | None = None
        self._start(start_update)

    def _start(self, update: int) -> None:
        """Continue with the batch of this update; the thread, if any, has ended."""
        self._next_update = update
        self._stopped = threading.Event()
        self._queue: queue.Queue[UpdateBatch | BaseException] | None = None
        if self._prefetch_updates > 0:
            self._queue = queue.Queue(maxsize=self._prefetch_updates)
            self._thread = threading.Thread(
                target=self._prefetch, args=(update,), name="UpdateLoader", daemon=True
            )
            self._thread.start()

    def seek(self, update: int) -> None:
        """Make the batch of this update the next one; batches read ahead are dropped."""
        self.close()
        self._start(update)

    def __iter__(self) -> Iterator[UpdateBatch]:
        return self

    def __next__(self) -> UpdateBatch:
        if self._stopped.is_set():
            raise StopIteration
        if self._queue is None:
            item: UpdateBatch | BaseException = self._load_or_pad(self._next_update)
        else:
            item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._next_update = item.update + 1
        return item

    def _load_or_pad(self, update: int) -> UpdateBatch:
        """The batch of one update; after a deferred error one without targets."""
        if self.error is None:
            try:
                return self._load(update)
            except UserError as error:
                if not self._defer_errors:
                    raise
                self.error = error
        padding = _padding(self._dataset, self._micro_batch_size)
        micro_batches = [padding] * (len(self._mine) // self._micro_batch_size)
        sources = (0,) * len(self._dataset.sources)
        return UpdateBatch(update, micro_batches, 0, sources, self.error)

    def _load(self, update: int) -> UpdateBatch:
        """Read the batch of one update."""
        samples, num_targets = self._plan(update)
        sources = np.bincount(
            self._dataset.source_of(samples), minlength=len(self._dataset.sources)
        )
        shape = (len(self._mine), self._dataset.sequence_length)
        tensors = [
            torch.empty(shape, dtype=_TORCH[dtype], pin_memory=self._pin_memory)
            for dtype in self._dataset.dtypes
        ]
        self._dataset.read(samples[self._mine], [tensor.numpy() for tensor in tensors])
        split = [tensor.split(self._micro_batch_size) for tensor in tensors]
        micro_batches = list(zip(*split, strict=True))
        return UpdateBatch(update, micro_batches, num_targets, tuple(sources.tolist()))

    def _plan(self, update: int) -> tuple[np.ndarray, int]:
        """Samples of the global batch, and its number of targets.

        Small batches are planned several updates at a time: the cost is per call and per shard.
        """
        if not 0 <= update - self._planned_from < len(self._planned_targets):
            planned = min(SAMPLES_PLANNED, self._dataset.num_samples)
            updates = max(1, planned // self._global_batch_size)
            first = update * self._global_batch_size
            positions = np.arange(first, first + updates * self._global_batch_size, dtype=np.int64)
            samples = self._dataset.sample_ids(positions, self._seed)
            targets = self._dataset.count_targets(samples).reshape(updates, -1).sum(axis=1)
            self._planned_from, self._planned_targets = update, targets
            self._planned_samples = samples.reshape(updates, -1)
        row = update - self._planned_from
        return self._planned_samples[row], int(self._planned_targets[row])

    def _prefetch(self, update: int) -> None:
        while not self._stopped.is_set():
            try:
                item: UpdateBatch | BaseException = self._load_or_pad(update)
            except BaseException as error:
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            update += 1

    def _put(self, item: UpdateBatch | BaseException) -> None:
        assert self._queue is not None
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=STOP_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._stopped.set()
        if self._queue is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> UpdateLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvaluationBatches:
    """A fixed set of samples, the same at every evaluation and for every number of ranks.

    The samples come in the shuffled order of seed 0, so that a subset is drawn from the whole data
    set. With ``max_targets`` they are the longest prefix of that order with at most that number of
    targets (at least one sample), otherwise all. Every rank gets the same number of micro-batches
    of ``(b, S)``; surplus rows have no targets.

    Iterating yields micro-batches as in UpdateBatch. ``len()``: micro-batches of a rank;
    ``num_targets``: targets over all ranks; ``num_samples``: samples over all ranks.
    ``defer_errors``: as in UpdateLoader; the rest of the batches then has no targets.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_targets: int | None = None,
        defer_errors: bool = False,
    ) -> None:
        if micro_batch_size < 1:
            raise UserError(
                f"the evaluation micro-batch is {micro_batch_size}, it must be positive"
            )
        self._dataset, self._rank, self._world_size = dataset, rank, world_size
        self._micro_batch_size = micro_batch_size
        self._defer_errors = defer_errors
        self.error: UserError | None = None
        self.num_samples, self.num_targets = self._select(max_targets)
        self._length = -(-self.num_samples // (micro_batch_size * world_size))

    def _select(self, max_targets: int | None) -> tuple[int, int]:
        samples = targets = 0
        total = self._dataset.num_samples
        while samples < total:
            block = np.arange(samples, min(samples + SAMPLES_AT_ONCE, total), dtype=np.int64)
            ends = targets + np.cumsum(self._dataset.count_targets(self._order(block)))
            fitting = len(block)
            if max_targets is not None:
                fitting = int(np.searchsorted(ends, max_targets, side="right"))
            if samples == 0:
                fitting = max(1, fitting)
            samples += fitting
            targets = int(ends[fitting - 1]) if fitting else targets
            if fitting < len(block):
                break
        return samples, targets

    def _order(self, positions: np.ndarray) -> np.ndarray:
        return self._dataset.sample_ids(positions, seed=0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._micro_batch_size
        for number in range(self._length):
            first = (number * self._world_size + self._rank) * size
            rows = np.arange(first, min(first + size, self.num_samples), dtype=np.int64)
            batch = _padding(self._dataset, size)
            if len(rows) and self.error is None:
                self._fill(rows, batch)
            yield batch

    def _fill(self, rows: np.ndarray, batch: MicroBatch) -> None:
        try:
            arrays = self._dataset.read(self._order(rows))
        except UserError as error:
            if not self._defer_errors:
                raise
            self.error = error
            return
        for tensor, array in zip(batch, arrays, strict=True):
            tensor[: len(rows)] = torch.from_numpy(array)
