"""Batches: the same global batch on any number of ranks, reading ahead, evaluation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from megalr.data import EvaluationBatches, TokenDataset, UpdateLoader, open_training_data
from megalr.errors import UserError
from tests.data.shards import random_documents, write_dataset


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "unpacked"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, [random_documents(23, seed) for seed in range(3)])
    return open_training_data(folder, sequence_length=16, packing=request.param)


def _rows(loader: UpdateLoader, updates: int) -> list[list[tuple[list[int], list[int]]]]:
    """Per update, the (input, label) rows of all micro-batches in order."""
    result = []
    with loader:
        for batch, _ in zip(loader, range(updates), strict=False):
            inputs = torch.cat([ids for ids, _ in batch.micro_batches])
            labels = torch.cat([labels for _, labels in batch.micro_batches])
            result.append(list(zip(inputs.tolist(), labels.tolist(), strict=True)))
    return result


def test_the_global_batch_is_a_function_of_seed_and_update_only(dataset: TokenDataset) -> None:
    updates = 30  # several epochs
    whole = _rows(UpdateLoader(dataset, global_batch_size=12, micro_batch_size=12, seed=4), updates)
    for world_size, micro, start, prefetch in [(1, 3, 0, 0), (2, 3, 7, 2), (3, 2, 29, 1)]:
        ranks = [
            _rows(
                UpdateLoader(
                    dataset,
                    global_batch_size=12,
                    micro_batch_size=micro,
                    rank=rank,
                    world_size=world_size,
                    seed=4,
                    start_update=start,
                    prefetch_updates=prefetch,
                ),
                updates - start,
            )
            for rank in range(world_size)
        ]
        for number, expected in enumerate(whole[start:]):
            together = [row for rank in ranks for row in rank[number]]
            assert sorted(together) == sorted(expected)
    other = _rows(UpdateLoader(dataset, global_batch_size=12, micro_batch_size=12, seed=5), 1)
    assert other[0] != whole[0]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_can_jump_and_drops_what_it_had_read_ahead(
    dataset: TokenDataset, prefetch: int
) -> None:
    sizes = {"global_batch_size": 12, "micro_batch_size": 3, "seed": 4}
    expected = _rows(UpdateLoader(dataset, start_update=9, **sizes), 2)
    with UpdateLoader(dataset, prefetch_updates=prefetch, **sizes) as loader:
        assert [next(loader).update for _ in range(2)] == [0, 1]
        loader.seek(9)
        assert _rows(loader, 2) == expected
    assert not any(thread.name == "UpdateLoader" for thread in threading.enumerate())


def test_batches_hold_the_samples_of_the_order_and_count_their_targets(
    dataset: TokenDataset,
) -> None:
    loader = UpdateLoader(dataset, global_batch_size=6, micro_batch_size=2, seed=1, start_update=5)
    with loader:
        batch = next(loader)
    assert batch.update == 5
    assert [tuple(ids.shape) for ids, _ in batch.micro_batches] == [(2, 16)] * 3
    samples = dataset.sample_ids(np.arange(30, 36), 1)
    inputs, labels = dataset.read(samples)
    assert torch.equal(torch.cat([ids for ids, _ in batch.micro_batches]), torch.tensor(inputs))
    got = torch.cat([labels for _, labels in batch.micro_batches])
    assert torch.equal(got, torch.tensor(labels))
    assert got.dtype == torch.int64 and got.is_contiguous()
    assert batch.num_targets == (labels != -100).sum()
    assert batch.samples_by_source == (6,)


def test_num_targets_counts_the_global_batch_on_every_rank(dataset: TokenDataset) -> None:
    counts = []
    for rank in range(3):
        with UpdateLoader(
            dataset, global_batch_size=9, micro_batch_size=3, rank=rank, world_size=3
        ) as loader:
            batches = [next(loader) for _ in range(4)]
        own = [sum(int((y != -100).sum()) for _, y in b.micro_batches) for b in batches]
        counts.append((own, [b.num_targets for b in batches]))
    assert counts[0][1] == counts[1][1] == counts[2][1]
    assert [sum(own[u] for own, _ in counts) for u in range(4)] == counts[0][1]


def test_batch_sizes_that_do_not_divide_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match=r"10 sequences.*of 4 on 2 .*multiple of 8"):
        UpdateLoader(dataset, global_batch_size=10, micro_batch_size=4, world_size=2)


class _FailsLater:
    """A data set whose third batch cannot be read."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset, self.reads = dataset, 0

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def read(self, samples: np.ndarray, out: tuple[np.ndarray, np.ndarray]):
        self.reads += 1
        if self.reads == 3:
            raise UserError("planted")
        return self._dataset.read(samples, out)


def test_an_error_of_the_reading_thread_reaches_the_consumer_and_ends_the_loader(
    dataset: TokenDataset,
) -> None:
    loader = UpdateLoader(_FailsLater(dataset), global_batch_size=2, micro_batch_size=2)  # type: ignore[arg-type]
    assert [next(loader).update for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="planted"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_close_ends_the_thread_even_when_the_queue_is_full(dataset: TokenDataset) -> None:
    before = threading.active_count()
    loader = UpdateLoader(dataset, global_batch_size=2, micro_batch_size=2, prefetch_updates=1)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 3), (3, 5)])
@pytest.mark.parametrize("max_targets", [None, 200, 1])
def test_evaluation_reads_the_same_samples_on_any_number_of_ranks(
    dataset: TokenDataset, world_size: int, micro: int, max_targets: int | None
) -> None:
    rows, lengths, counts = [], set(), set()
    for rank in range(world_size):
        batches = EvaluationBatches(
            dataset,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
            max_targets=max_targets,
        )
        got = list(batches)
        assert len(got) == len(batches)
        lengths.add(len(got))
        counts.add((batches.num_targets, batches.num_samples))
        for inputs, labels in got:
            assert inputs.shape == labels.shape == (micro, 16)
            rows += list(zip(inputs.tolist(), labels.tolist(), strict=True))
    assert len(lengths) == len(counts) == 1
    num_targets, num_samples = counts.pop()
    order = dataset.sample_ids(np.arange(dataset.num_samples), 0)
    ends = np.cumsum(dataset.count_targets(order))
    if max_targets is None:
        assert num_samples == dataset.num_samples
    else:
        assert num_samples == 1 or num_targets <= max_targets
        assert num_samples == dataset.num_samples or ends[num_samples] > max_targets
    assert num_targets == ends[num_samples - 1]
    wanted = dataset.read(order[:num_samples])
    expected = list(zip(wanted[0].tolist(), wanted[1].tolist(), strict=True))
    filler = ([dataset.pad_id] * 16, [-100] * 16)
    assert sorted(rows) == sorted(expected + [filler] * (len(rows) - len(expected)))
