"""Rules for whole matrices under tensor and data parallelism, against float64 formulas."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from megalr.optim import Muon, NorMuon, Spectron, muon
from megalr.sharding.fragment import UNCUT, Cut, FlatLayout, LogicalTensor, Ranks, slice_fragments
from megalr.sharding.workers import agreed, completed, counts, from_workers, share, to_workers
from tests.optim import oracle
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import mesh

UPDATES = 5
ROWS, COLUMNS, WHOLE = 0, 1, None
MATRICES = {
    "a": ((12, 6), ROWS),
    "b": ((12, 6), ROWS),
    "c": ((6, 12), COLUMNS),
    "d": ((12, 6), COLUMNS),
    "e": ((6, 6), ROWS),
    "f": ((12, 6), WHOLE),
    "g": ((12, 6), ROWS),
    "h": ((6, 24), ROWS),
    "i": ((12, 12), COLUMNS),  # its part has the shape of that of j
    "j": ((12, 6), WHOLE),
}
RULES = {
    "muon": (Muon, {}, {}),
    "dion2": (Muon, {"fraction": 0.25}, {"fraction": 0.25}),
    "normuon": (NorMuon, {"muon_beta2": 0.9}, {"beta2": 0.9}),
    "nordion2": (NorMuon, {"muon_beta2": 0.9, "fraction": 0.25}, {"beta2": 0.9, "fraction": 0.25}),
}
PAIRS = {
    "p": (12, 3, 18, ROWS, WHOLE),
    "q": (12, 3, 18, WHOLE, COLUMNS),
    "r": (12, 3, 18, ROWS, COLUMNS),
    "s": (12, 3, 18, ROWS, COLUMNS),
    "t": (6, 6, 6, ROWS, WHOLE),
}


class Grid:
    """Whole matrices by name as one flat tensor on every rank, its slice of its parts."""

    def __init__(self, tensor: int, whole: dict[str, np.ndarray], cuts: dict[str, int | None]):
        self.mesh, self.cuts = mesh(tensor), cuts
        data = Ranks.of(self.mesh.data_group)
        place = Ranks.of(self.mesh.tensor_group)
        tensors, first = [], 0
        self.numel = sum(self._part(name, value).size for name, value in whole.items())
        self.share = -(-self.numel // data.size)
        for name, value in whole.items():
            part, dim = self._part(name, value), cuts[name]
            fragments = slice_fragments(part.size, first, self.share, data.size)
            # The owner is the last holder: ranks of a tensor-parallel group need only agree on it.
            owner, cut = fragments[-1].rank, UNCUT if dim is None else Cut(place, dim)
            tensors.append(LogicalTensor(name, part.shape, fragments, owner, cut=cut))
            first += part.size
        self.layout = FlatLayout(tuple(tensors), data)
        self.flat = torch.nn.Parameter(self.slice(whole))

    def _part(self, name: str, value: np.ndarray) -> np.ndarray:
        if self.cuts[name] is None:
            return value
        return np.split(value, self.mesh.tensor_size, axis=self.cuts[name])[self.mesh.tensor_rank]

    def slice(self, whole: dict[str, np.ndarray]) -> torch.Tensor:
        """This rank's slice of whole matrices."""
        parts = [self._part(name, value).reshape(-1) for name, value in whole.items()]
        padding = np.zeros(self.share * self.mesh.data_size - self.numel)
        slices = np.concatenate([*parts, padding]).reshape(self.mesh.data_size, -1)
        return torch.from_numpy(slices[self.mesh.data_rank].copy())

    def distance(self, whole: dict[str, np.ndarray]) -> float:
        """Largest distance of the weights here from those of whole matrices."""
        return float((self.flat.detach() - self.slice(whole)).abs().max())


def _trained(grid: Grid, optimizer: torch.optim.Optimizer, grads: list, wanted: list) -> float:
    optimizer.attach_layouts({grid.flat: grid.layout})
    distances = []
    for gradient, weights in zip(grads, wanted, strict=True):
        grid.flat.grad = grid.slice(gradient)
        optimizer.step()
        distances.append(grid.distance(weights))
    return max(distances)


@mock.patch.object(muon, "_gram_dtype", lambda device: torch.float64)
def _muon_distance(tensor: int, rule: str) -> float:
    kind, ours, theirs = RULES[rule]
    first = {name: oracle.weight(*shape) for name, (shape, _) in MATRICES.items()}
    cuts = {name: dim for name, (_, dim) in MATRICES.items()}
    grads = [
        {n: oracle.gradient(t, *s, float(k)) for k, (n, (s, _)) in enumerate(MATRICES.items())}
        for t in range(UPDATES)
    ]
    options = {"lr": 0.02, "weight_decay": 0.3}
    trajectories = {
        name: oracle.muon(first[name], [g[name] for g in grads], 0.02, 0.9, wd=0.3, **theirs)
        for name in MATRICES
    }
    wanted = [{name: w[t] for name, w in trajectories.items()} for t in range(UPDATES)]
    grid = Grid(tensor, first, cuts)
    optimizer = kind([grid.flat], momentum=0.9, **options, **ours)
    optimizer.param_groups[0]["use_muon"] = True  # set late: a flat tensor is no matrix
    return _trained(grid, optimizer, grads, wanted)


@mock.patch.object(muon, "_gram_dtype", lambda device: torch.float64)
def _spectron_distance(tensor: int) -> float:
    first: dict[str, np.ndarray] = {}
    cuts: dict[str, int | None] = {}
    grads: list[dict[str, np.ndarray]] = [{} for _ in range(UPDATES)]
    wanted: list[dict[str, np.ndarray]] = [{} for _ in range(UPDATES)]
    for k, (name, (m, r, n, b_cut, a_cut)) in enumerate(PAIRS.items()):
        b = oracle.weight(m, r) + 0.3 * np.eye(m, r)
        a = oracle.weight(r, n) - 0.5 * np.eye(r, n)
        pairs = [
            (oracle.gradient(t, m, r, k), oracle.gradient(t, r, n, k + 0.5)) for t in range(UPDATES)
        ]
        trajectory = oracle.spectron(b, a, pairs, 0.05, 0.9, wd=0.5)
        first |= {f"{name}.B": b, f"{name}.A": a}
        cuts |= {f"{name}.B": b_cut, f"{name}.A": a_cut}
        for t in range(UPDATES):
            grads[t] |= dict(zip((f"{name}.B", f"{name}.A"), pairs[t], strict=True))
            wanted[t] |= dict(zip((f"{name}.B", f"{name}.A"), trajectory[t], strict=True))
    grid = Grid(tensor, first, cuts)
    with mock.patch.object(Spectron, "_pairs", lambda self: [1]):
        optimizer = Spectron([grid.flat], lr=0.05, momentum=0.9, weight_decay=0.5)
    optimizer.param_groups[0]["use_spectron"] = True
    return _trained(grid, optimizer, grads, wanted)


GRIDS = [(2, 1), (3, 1), (2, 2)]
"""Tensor-parallel and data-parallel ranks; by 3, batches do not divide evenly."""


@pytest.mark.parametrize(("tensor", "data"), GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_parts_move_like_those_of_the_whole_matrices(rule: str, tensor: int, data: int) -> None:
    distances = run_distributed(_muon_distance, tensor * data, tensor, rule)
    assert max(distances) < 1e-11


@pytest.mark.parametrize(("tensor", "data"), GRIDS)
def test_parts_of_pairs_move_like_those_of_the_whole_pairs(tensor: int, data: int) -> None:
    distances = run_distributed(_spectron_distance, tensor * data, tensor)
    assert max(distances) < 1e-11


def _not_finite(kind: type) -> list:
    """Update and state after a gradient with a NaN in the part of the last rank."""
    place = Ranks.of(mesh(2).tensor_group)
    flat = torch.nn.Parameter(torch.zeros(2 * 18))
    tensors = tuple(
        LogicalTensor(name, (3, 6), slice_fragments(18, 18 * i, 36, 1), cut=Cut(place, 0))
        for i, name in enumerate("xy")
    )
    optimizer = kind([flat], lr=1.0)
    optimizer.param_groups[0]["use_muon"] = True
    optimizer.attach_layouts({flat: FlatLayout(tensors)})
    states = []
    for update in range(2):
        flat.grad = torch.randn(36, generator=torch.Generator().manual_seed(update))
        if update == 1 and place.rank == 1:
            flat.grad[20] = float("nan")
        optimizer.step()
        state = optimizer.state[flat]["matrices"]
        states.append({n: {k: v.clone() for k, v in s.items()} for n, s in state.items()})
    x, y = flat.detach().split(18)
    kept = all(torch.equal(states[0]["y"][k], states[1]["y"][k]) for k in states[0]["y"])
    moved = not torch.equal(states[0]["x"]["momentum_buffer"], states[1]["x"]["momentum_buffer"])
    return [bool(x.isfinite().all()), bool(y.isnan().all()), kept, moved]


@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_a_gradient_that_is_not_finite_on_one_rank_concerns_its_matrix_on_all(kind: type) -> None:
    assert run_distributed(_not_finite, 2, kind) == [[True] * 4] * 2


def _there_and_back(tensor: int, dtype: torch.dtype) -> bool:
    place = Ranks.of(mesh(tensor).tensor_group)
    right = []
    for total in range(1, 2 * tensor + 2):
        whole = torch.arange(total * 6 * 6).view(total, 6, 6).remainder(97).to(dtype)
        for dim in (0, 1):
            cut = Cut(place, dim)
            parts = torch.stack([cut.part(matrix) for matrix in whole])
            mine = to_workers(parts, cut)
            right.append(torch.equal(mine, whole[share(cut, total)]) and mine.dtype == dtype)
            right.append(torch.equal(from_workers(mine, cut, total), parts))
            right.append(sum(counts(cut, total)) == total)
            chosen = share(cut, total)
            right.append(torch.equal(completed(whole[chosen], cut, 0, chosen, total), whole))
    flags = torch.tensor([True, place.rank > 0, place.rank < tensor - 1])
    return all(right) and agreed(flags, Cut(place)).tolist() == [True, False, False]


@pytest.mark.parametrize("tensor", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_workers_get_whole_matrices_and_give_parts_back(tensor: int, dtype: torch.dtype) -> None:
    assert run_distributed(_there_and_back, tensor, tensor, dtype) == [True] * tensor


def test_what_is_left_over_is_shared_between_ranks() -> None:
    rows, columns = (Cut(Ranks(0, 4), dim) for dim in (0, 1))
    assert counts(rows, 6) == [2, 2, 1, 1] and counts(columns, 6) == [1, 1, 2, 2]
    assert counts(rows, 1) == [1, 0, 0, 0] and counts(UNCUT, 3) == [3]
