"""Temporary memory of Muon's update, counted allocation by allocation on the CPU."""

from __future__ import annotations

import math
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megalr.config.methods import FullRankMethod
from megalr.estimate.states import ORTHOGONAL_BYTES, orthogonalized_together
from megalr.estimate.tensors import Stored, stored_tensors
from megalr.layers.factors import set_row_blocks
from megalr.models.config import decoder_config
from megalr.optim import Muon, NorMuon, Spectron, muon
from megalr.sharding import exchange
from megalr.sharding.fragment import Cut, FlatLayout, Fragment, LogicalTensor, Ranks
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import mesh


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is on; ``known`` ones are not counted."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = {t.untyped_storage()._cdata: 0 for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def temporary_bytes(
    shapes: list[tuple[int, int]], chunk: int, kind: Any = Muon, **options: Any
) -> int:
    """Peak of one update of matrices of these shapes, at most ``chunk`` elements at a time."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return _peak(kind(weights, use_muon=True, **options), weights, chunk)


def _peak(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], chunk: int) -> int:
    """Peak of one update with random gradients, at most ``chunk`` elements at a time."""
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    with (
        mock.patch.object(exchange.buckets, "__defaults__", (chunk,)),
        mock.patch.object(muon, "_gram_dtype", lambda device: torch.float16),  # as on a GPU
    ):
        optimizer.step()
        known = [t for w in weights for t in (w, w.grad, *_tensors(optimizer.state[w]))]
        with Allocations(known) as counted:
            optimizer.step()
    return counted.peak


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in tree_leaves(dict(state)) if isinstance(t, torch.Tensor)]


SQUARE, WIDE, TALL = (256, 256), (256, 704), (704, 256)


@pytest.mark.parametrize("kind", [Muon, NorMuon])
@pytest.mark.parametrize("method", ["gram", "standard"])
@pytest.mark.parametrize("shapes", [[SQUARE] * 6, [WIDE] * 3, [TALL] * 3, [SQUARE, WIDE, TALL]])
def test_temporaries_are_those_of_a_chunk(
    shapes: list[tuple[int, int]], method: str, kind: Any
) -> None:
    numel = sum(map(math.prod, shapes))
    peak = temporary_bytes(shapes, numel, kind, ns_method=method)
    assert 0.45 * ORTHOGONAL_BYTES * numel < peak <= ORTHOGONAL_BYTES * numel * 1.01


@pytest.mark.parametrize("kind", [Muon, NorMuon])
@pytest.mark.parametrize("fraction", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("shape", [SQUARE, TALL])
def test_temporaries_of_a_fraction_are_those_of_the_chosen_slices(
    shape: tuple[int, int], fraction: float, kind: Any
) -> None:
    chosen = math.ceil(12 * math.prod(shape) * fraction)
    peak = temporary_bytes([shape] * 24, chosen, kind, fraction=fraction)
    assert 0.45 * ORTHOGONAL_BYTES * chosen < peak <= ORTHOGONAL_BYTES * chosen * 1.01


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL])
@pytest.mark.parametrize("rank", [32, 128])
def test_temporaries_of_pairs_are_those_of_their_larger_factors(
    shape: tuple[int, int], rank: int
) -> None:
    (m, n), weights = shape, []
    for number in range(24):
        for name, size in ((f"w{number}.B", (m, rank)), (f"w{number}.A", (rank, n))):
            weights.append(torch.nn.Parameter(torch.randn(size)))
            set_row_blocks(weights[-1], (name,), [(0, size[0])])
    chunk = 6 * rank * max(m, n)
    peak = _peak(Spectron([{"params": weights, "use_spectron": True}]), weights, chunk)
    assert 0.45 * ORTHOGONAL_BYTES * chunk < peak <= ORTHOGONAL_BYTES * chunk * 1.01


def _uncounted(received: torch.Tensor, sent: torch.Tensor, *splits: Any, group: Any) -> None:
    """An exchange through copies that are not counted: gloo holds on to its tensors for a while."""
    with _disable_current_modes():
        values, found = sent.clone(), received.clone()
        torch.distributed.distributed_c10d.all_to_all_single(found, values, *splits, group=group)
        received.copy_(found)


@mock.patch.object(torch.distributed, "all_to_all_single", _uncounted)
def _bytes_of_parts(count: int, dim: int, kind: Any, options: dict[str, Any]) -> int:
    """Peak of one update of ``count`` matrices cut over two tensor-parallel ranks."""
    cut = Cut(Ranks.of(mesh(2).tensor_group), dim)
    shape = (128, 256) if dim == 0 else (256, 128)
    numel = math.prod(shape)
    flat = torch.nn.Parameter(torch.randn(count * numel))
    tensors = tuple(
        LogicalTensor(str(i), shape, (Fragment(0, 0, i * numel, numel),), cut=cut)
        for i in range(count)
    )
    optimizer = kind([flat], **options)
    optimizer.param_groups[0]["use_muon"] = True
    optimizer.attach_layouts({flat: FlatLayout(tensors)})
    flat.grad = torch.randn_like(flat)
    optimizer.step()
    with Allocations([flat, flat.grad, *_tensors(optimizer.state[flat])]) as counted:
        optimizer.step()
    return counted.peak


@pytest.mark.parametrize("options", [{}, {"fraction": 0.25}])
@pytest.mark.parametrize("kind", [Muon, NorMuon])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_temporaries_of_parts_are_those_of_the_matrices_that_a_rank_works_on(
    count: int, dim: int, kind: Any, options: dict[str, Any]
) -> None:
    peaks = run_distributed(
        _bytes_of_parts, 2, count, dim, kind, {"ns_method": "standard", **options}
    )
    part = math.prod(SQUARE) // 2
    stored = [Stored("q", count * part, "targets", True, ((128, 256),) * count)]
    chunk = ORTHOGONAL_BYTES * orthogonalized_together(stored, 1, 1.0, tensor_ranks=2)
    assert 0.45 * chunk < max(peaks) <= 1.01 * chunk


def test_more_matrices_than_a_chunk_holds_need_no_more_memory() -> None:
    few, many = (temporary_bytes([SQUARE] * count, 3 * 2**16) for count in (3, 12))
    assert many == few


def test_the_chunk_of_a_model() -> None:
    tensors = stored_tensors(sizes := decoder_config("llama_1b", {}), FullRankMethod())
    assert orthogonalized_together(tensors, sizes.num_layers, 1.0) == 32 * 2**20
    small = stored_tensors(sizes := decoder_config("llama_9m", {}), FullRankMethod())
    matrices = sum(m * n for t in small for m, n in t.matrices) * sizes.num_layers
    assert orthogonalized_together(small, sizes.num_layers, 0.5) == math.ceil(matrices / 2)
