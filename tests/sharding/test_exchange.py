"""Tensors of several flat tensors on their way to their owners and back, on real processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalr.sharding import exchange
from megalr.sharding.exchange import (
    MatrixUpdate,
    broadcast_from_owners,
    buckets,
    from_owner,
    least_loaded,
    to_owner,
    update_matrices,
)
from megalr.sharding.fragment import (
    Cut,
    FlatLayout,
    Fragment,
    LogicalTensor,
    Ranks,
    share_fragments,
    slice_fragments,
    within,
)
from tests.ranks import run_distributed

SIZES = {"x": (3, 5), "y": (4, 4), "z": (2, 3)}


def _whole(name: str) -> torch.Tensor:
    m, n = SIZES[name]
    return torch.arange(m * n, dtype=torch.float32).view(m, n) + 100 * ord(name)


def _there_and_back(dtype: torch.dtype) -> None:
    """x and y in a buffer of equal slices, z in a flat tensor of its own that is split evenly."""
    ranks = Ranks.of(dist.group.WORLD)
    size, rank = ranks.size, ranks.rank
    buffer = torch.cat([_whole("x").flatten(), _whole("y").flatten()])
    slice_size = -(-len(buffer) // size)
    padded = torch.nn.functional.pad(buffer, (0, slice_size * size - len(buffer)))
    first = padded.chunk(size)[rank].clone().to(dtype)
    share = -(-6 // size)
    second = torch.zeros(3 + share, dtype=dtype)
    mine = _whole("z").flatten()[rank * share : (rank + 1) * share]
    second[3 : 3 + len(mine)] = mine
    tensors = [
        (LogicalTensor("x", (3, 5), slice_fragments(15, 0, slice_size, size), size - 1), first),
        (LogicalTensor("y", (4, 4), slice_fragments(16, 15, slice_size, size), 0), first),
        (LogicalTensor("z", (2, 3), share_fragments(6, share, 3, size), size - 1), second),
    ]
    like = torch.empty(0, dtype=torch.float32)
    found = to_owner(ranks, tensors, like)
    assert set(found) == {tensor.name for tensor, _ in tensors if tensor.owner == rank}
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, _whole(name).to(dtype).float())
    changed = {name: value * 2 for name, value in found.items()}
    parts = from_owner(ranks, [tensor for tensor, _ in tensors], changed, like)
    for tensor, flat in tensors:
        fragment = tensor.on(rank)
        assert (fragment is None) == (tensor.name not in parts)
        if fragment is not None:
            assert torch.equal(parts[tensor.name], 2 * fragment.of(flat).float())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_several_flats_arrive_whole_and_return_in_fragments(
    world: int, dtype: torch.dtype
) -> None:
    run_distributed(_there_and_back, world, dtype)


def _broadcast() -> None:
    ranks = Ranks.of(dist.group.WORLD)
    flat = torch.full((10,), float(ranks.rank))
    tensors = [
        (LogicalTensor("p", (2, 2), (Fragment(0, 0, 1, 4),), owner=1), flat),
        (LogicalTensor("q", (3,), (Fragment(0, 0, 6, 3),), owner=0), flat),
    ]
    broadcast_from_owners(ranks, tensors)
    own = float(ranks.rank)
    assert flat.tolist() == [own, 1, 1, 1, 1, own, 0, 0, 0, own]


def test_owners_results_reach_ranks_that_hold_everything() -> None:
    run_distributed(_broadcast, 3)


def test_fragments_of_a_part_are_those_of_its_elements() -> None:
    whole = slice_fragments(20, 3, 8, 4)  # 5, 8 and 7 elements
    assert [f.numel for f in whole] == [5, 8, 7]
    flats = [torch.arange(8) + 8 * rank for rank in range(4)]
    for first, numel in ((0, 20), (2, 4), (4, 10), (13, 7), (5, 8)):
        inside = within(whole, first, numel)
        elements = torch.cat([f.of(flats[f.rank]) for f in inside])
        assert elements.tolist() == list(range(3 + first, 3 + first + numel))
        assert [f.start for f in inside] == [0, *(f.stop for f in inside)][:-1]


def test_work_goes_to_the_least_loaded_candidate() -> None:
    load = [0.0, 4.0, 0.0]
    chosen = least_loaded([1.0, 5.0, 3.0, 3.0], [[0, 1], [1, 2], [0, 2], [0, 1, 2]], load)
    # 5 to rank 2; the first 3 to rank 0; the second to rank 0, loaded with 3; 1 to rank 1.
    assert chosen == [1, 2, 0, 0] and load == [6.0, 5.0, 5.0]


def test_buckets_keep_the_order_and_the_limit() -> None:
    found = list(buckets([3, 1, 9, 2, 2, 2], lambda item: item, 4))
    assert found == [[3, 1], [9], [2, 2], [2]]
    assert list(buckets([], lambda item: item, 4)) == []


def test_matrices_of_a_shape_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers have them in turn, a chunk would hold one or two of each shape."""
    monkeypatch.setattr(exchange.buckets, "__defaults__", (24,))
    shapes = [(2, 4), (4, 2), (2, 4), (3, 6), (2, 4), (4, 2)]
    tensors, start = [], 0
    for number, (m, n) in enumerate(shapes):
        fragment = Fragment(0, 0, start, m * n)
        tensors.append(LogicalTensor(f"w{number}", (m, n), (fragment,), 0, number))
        start += m * n
    flat, grad = torch.zeros(start), torch.arange(start, dtype=torch.float32)
    chunks: list[list[str]] = []

    def rule(items: list[exchange.Item]) -> list[torch.Tensor]:
        chunks.append([tensor.name for tensor, _ in items])
        return [g * (index + 1) for index, (_, g) in enumerate(items)]

    update_matrices(
        [MatrixUpdate(FlatLayout(tuple(tensors)), flat, grad, rule, torch._foreach_add_)]
    )
    assert chunks == [["w0", "w2", "w4"], ["w3"], ["w1", "w5"]]
    factors = torch.cat(
        [torch.full((m * n,), f) for (m, n), f in zip(shapes, (1, 1, 2, 1, 3, 2), strict=True)]
    )
    assert torch.equal(flat, grad * factors)


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_are_added_to_a_matrix_and_are_zero_elsewhere(dim: int) -> None:
    places, shape = torch.tensor([3, 0]), (5, 4)
    values = torch.randn((2, 4) if dim == 0 else (5, 2), dtype=torch.float64)
    want = torch.zeros(shape, dtype=torch.float64)
    for index, place in enumerate(places.tolist()):
        want.select(dim, place).copy_(values.select(dim, index))
    slices = exchange.Slices(shape, dim, places, values)
    assert torch.equal(slices.dense(), want)
    dense, (sliced, other) = torch.randn(6), torch.randn(2, 20).unbind()
    was = dense.clone(), sliced.clone(), other.clone()
    exchange.add_changes([sliced, dense, other], [slices, torch.ones(6), slices])
    assert torch.equal(dense, was[0] + 1)
    for found, old in ((sliced, was[1]), (other, was[2])):
        assert torch.equal(found, old + want.float().flatten())


def test_a_chunk_holds_more_matrices_of_which_less_is_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a quarter of the elements; all of those of matrices that tensor parallelism cuts."""
    monkeypatch.setattr(exchange.buckets, "__defaults__", (8,))
    cuts = [Cut()] * 6 + [Cut(Ranks(0, 2))] * 2
    tensors = [
        LogicalTensor(f"w{i}", (2, 4), (Fragment(0, 0, 8 * i, 8),), 0, i, cut)
        for i, cut in enumerate(cuts)
    ]
    chunks: list[list[str]] = []

    def rule(items: list[exchange.Item]) -> list[torch.Tensor]:
        chunks.append([tensor.name for tensor, _ in items])
        return [g for _, g in items]

    layout, grad = FlatLayout(tuple(tensors)), torch.ones(64)
    update_matrices(
        [MatrixUpdate(layout, torch.zeros(64), grad, rule, torch._foreach_add_, worked_on=0.25)]
    )
    assert chunks == [["w0", "w1", "w2", "w3"], ["w4", "w5"], ["w6"], ["w7"]]
