"""Rank moves between matrices: the choice, the factors, and a run that starts from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalr.checkpoint import open_checkpoint
from megalr.checkpoint.choose_ranks import Spectrum, as_entries, choose_ranks
from megalr.checkpoint.other_ranks import best_of_rank, measured_spectra
from megalr.cli.rank_budget import ranks_command
from megalr.errors import UserError
from megalr.hf.trained_run import load_decoder
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, losses, run, settings, zero


def _spectra(seed: int, size: tuple[int, int], count: int = 4) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 6, generator=generator, dtype=torch.double) ** 3
    values = values.sort(descending=True).values
    return [Spectrum(f"layers.{n}.mlp.up", size, tuple(v.tolist())) for n, v in enumerate(values)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multiple, growth", [(1, 1.0), (2, 1.0), (2, 2.0)])
def test_the_choice_keeps_the_most_of_all_choices_of_one_cost(
    seed: int, multiple: int, growth: float
) -> None:
    spectra = _spectra(seed, (9, 11))
    budget = 20 * 14
    ranks = choose_ranks(spectra, budget, multiple, growth)
    limit = min(9 // multiple * multiple, int(6 * growth) // multiple * multiple)

    def kept(found: tuple[int, ...]) -> float:
        total = 0.0
        for rank, one in zip(found, spectra, strict=True):
            squares = [value**2 for value in one.values]
            ratio = (squares[5] / squares[2]) ** (1 / 3)  # along the logarithms of the upper half
            squares += [squares[5] * ratio**step for step in range(1, limit - 5)]
            total += sum(squares[:rank])
        return total

    steps = range(multiple, limit + 1, multiple)
    every = itertools.product(steps, repeat=len(spectra))
    best = max(kept(found) for found in every if 20 * sum(found) <= budget)
    chosen = tuple(ranks[one.name] for one in spectra)
    assert 20 * sum(chosen) <= budget and all(rank in steps for rank in chosen)
    assert kept(chosen) == pytest.approx(best, rel=1e-12)


def test_rank_moves_from_spent_to_crowded_matrices_and_costs_count() -> None:
    flat = Spectrum("layers.0.mlp.down", (64, 64), (1.0,) * 16)
    steep = Spectrum("layers.0.attention.o", (64, 64), tuple(2.0**-n for n in range(16)))
    assert choose_ranks([flat, steep], 32 * 128) == {flat.name: 24, steep.name: 8}
    wide = Spectrum("layers.0.mlp.up", (64, 192), (1.0,) * 16)
    chosen = choose_ranks([flat, wide], 16 * 128 + 16 * 256)
    assert chosen == {flat.name: 32, wide.name: 8}
    even = [Spectrum(f"layers.{n}.mlp.up", (64, 64), (1.0,) * 16) for n in range(3)]
    first = choose_ranks(even, 40 * 128)
    assert list(first.values()) == [24, 8, 8]  # of equals the earlier one, up to what is known
    narrow = Spectrum("layers.0.attention.k", (6, 64), (1.0,) * 4)
    assert choose_ranks([narrow], 70 * 6) == {narrow.name: 6}
    with pytest.raises(UserError, match="a budget of 1,000 numbers is 1,048 too small for rank 8"):
        choose_ranks([flat, steep], 1000)


def test_entries_are_few_and_give_the_ranks_back() -> None:
    ranks = {f"layers.{n}.mlp.{name}": 8 for n in range(3) for name in ("up", "down")}
    ranks |= {"layers.1.mlp.down": 24, "layers.0.mlp.up": 16}
    entries = as_entries(ranks, 16)
    assert list(entries.items())[:2] == [("up", 8), ("down", 8)]
    assert entries == {"up": 8, "down": 8, "layers.0.mlp.up": 16, "layers.1.mlp.down": 24}


@pytest.mark.parametrize("rank", [3, 5, 8])
def test_factors_are_the_balanced_ones_of_the_best_approximation(rank: int) -> None:
    torch.manual_seed(rank)
    b, a = torch.randn(12, 6, dtype=torch.double), torch.randn(6, 9, dtype=torch.double)
    b[:, 5] = b[:, 4]  # one direction less
    drawn = torch.randn(rank, 9, dtype=torch.double)
    new_b, new_a = best_of_rank(b, a, rank, 1.7, lambda count: drawn[:count])
    u, s, vh = torch.linalg.svd(1.7 * b @ a)
    best = u[:, :rank] * s[:rank] @ vh[:rank] if rank <= 9 else 1.7 * b @ a
    torch.testing.assert_close(new_b @ new_a, best, rtol=1e-11, atol=1e-11)
    live = min(rank, 5)
    grams = new_b[:, :live].T @ new_b[:, :live], new_a[:live] @ new_a[:live].T
    torch.testing.assert_close(*grams, rtol=1e-10, atol=1e-10)
    assert torch.equal(new_a[live:], drawn[: rank - live]) and not new_b[:, live:].any()


METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"name": "low_rank", "rank": 8, "alpha": 16.0},
    "sltrain": {"name": "sltrain", "rank": 8, "alpha": 16.0, "density": 0.05},
    "lora": {"name": "lora", "rank": 8, "ranks": {"q": 6}},
}


@pytest.mark.parametrize(
    "name, ranks, stage",
    [
        ("low_rank", 2, 2),
        pytest.param("sltrain", 2, 3, marks=pytest.mark.long),
        pytest.param("lora", 1, 0, marks=pytest.mark.long),
        pytest.param("low_rank", 2, 1, marks=pytest.mark.long),
        pytest.param("low_rank", 2, 3, marks=pytest.mark.long),
    ],
)
def test_a_run_starts_from_the_best_approximations_at_its_ranks(
    name: str,
    ranks: int,
    stage: int,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, moved, fork = (tmp_path / part for part in ("source", "moved", "fork"))
    sections: dict[str, Any] = {"method": METHODS[name]}
    values = settings(source, data, **sections)
    run_distributed(run, 2, values, zero(2))
    ranks_command([str(source), "--output", str(moved), "--multiple", "2"])
    assert "method.ranks={" in capsys.readouterr().out
    entries = yaml.safe_load((moved / "ranks.yaml").read_text())["method"]["ranks"]
    old = load_decoder(source, open_checkpoint(source))
    spectra = measured_spectra(open_checkpoint(source))

    origin = {"fork_from": str(moved), "fork_state": "weights"}
    kept = {"checkpoint": {"every": 1, "keep_last": 20}, "train": {"updates": 3}}
    refused = settings(tmp_path / "other", data, **sections, **kept, run=origin)
    with pytest.raises(RankFailed, match=r"run.fork_from = .*method.ranks: \{.* there, "):
        run_distributed(run, 1, refused, zero(1))
    sections["method"] = {**METHODS[name], "ranks": entries}
    whole = settings(fork, data, **sections, **kept, run={"fork_from": str(moved)})
    with pytest.raises(RankFailed, match=r"holds weights alone: use run.fork_state=weights"):
        run_distributed(run, 1, whole, zero(1))
    values = settings(fork, data, **sections, **kept, run=origin)
    run_distributed(run, ranks, values, zero(stage))
    assert events(fork, "fork")[0]["source_update"] == 0
    new = load_decoder(fork, open_checkpoint(fork, "update_0"))
    _compare(old, new, spectra, _ranks_of(new))
    assert max(losses(fork)) < 4.8


def _ranks_of(decoder: Any) -> dict[str, int]:
    return {pair.name: pair.rank for pair in decoder.factor_pairs()}


def _compare(old: Any, new: Any, spectra: list[Spectrum], ranks: dict[str, int]) -> None:
    """Every matrix against the float64 SVD of the old product; all else bit for bit."""
    before, after = ({p.name: p for p in decoder.factor_pairs()} for decoder in (old, new))
    assert before.keys() == after.keys() and set(ranks.values()) != {8}
    numbers = [sum(r[one.name] * sum(one.size) for one in spectra) for r in (_ranks_of(old), ranks)]
    assert 0.9 * numbers[0] < numbers[1] <= numbers[0]
    for one in spectra:
        products = []
        for pair in (before[one.name], after[one.name]):
            b, a = pair.b[slice(*pair.b_rows)].double(), pair.a[slice(*pair.a_rows)].double()
            products.append((pair.scale * b @ a).detach())
        u, s, vh = torch.linalg.svd(products[0])
        torch.testing.assert_close(s[: one.rank], torch.tensor(one.values).double())
        r = ranks[one.name]
        best = u[:, :r] * s[:r] @ vh[:r]
        torch.testing.assert_close(products[1], best, rtol=1e-5, atol=1e-6)
    states = [dict(decoder.named_parameters()) for decoder in (old, new)]
    for name in states[0].keys() & states[1].keys():
        if not name.endswith((".a", ".b", ".values")) and "parts" not in name:
            assert torch.equal(states[0][name], states[1][name]), name
    if hasattr(old.blocks()[0].mlp.down, "sparse_weight"):
        for mine, theirs in zip(new.groups(), old.groups(), strict=True):
            for index in range(len(mine.shape.names)):
                layer, place = mine.layer_of(index)
                other, its = theirs.layer_of(index)
                assert torch.equal(layer.sparse_weight(place), other.sparse_weight(its))


def test_what_has_no_ranks_to_choose_is_refused(data: Path, tmp_path: Path) -> None:
    sections = {"method": {"name": "cola", "rank": 4}, "train": {"updates": 3}}
    run_distributed(run, 1, settings(tmp_path / "run", data, **sections), zero(1))
    with pytest.raises(UserError, match="method cola has no products of two factors"):
        ranks_command(["--run", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"--share 0\.0: must be above 0"):
        ranks_command(["--run", str(tmp_path / "run"), "--share", "0"])
