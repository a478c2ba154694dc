"""The order of samples: bijective, uniform, seekable; mixtures exact at every prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from megalr.data.shuffle import SampleOrder, mixing_period, permute
from megalr.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537, 1_000_003])
def test_permute_is_a_bijection(size: int) -> None:
    image = permute(np.arange(size), size, seed=3, epoch=1)
    assert np.array_equal(np.sort(image), np.arange(size))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _slow_permute(x: int, size: int, seed: int, stream: int, epoch: int) -> int:
    """The image of one element, in Python's integers."""
    key = _splitmix(_splitmix(_splitmix(seed % 2**64) ^ stream) ^ epoch)
    b = math.isqrt(size - 1) + 1
    sizes = (-(-size // b), b)
    while True:
        halves = list(divmod(x, b))
        for number in range(8):
            side = number % 2
            mixed = (halves[1 - side] ^ _splitmix(key ^ (number + 1))) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 29) * 0x94D049BB133111EB % 2**64
            halves[side] = (halves[side] + ((mixed >> 32) * sizes[side] >> 32)) % sizes[side]
        x = halves[0] * b + halves[1]
        if x < size:
            return x


@pytest.mark.parametrize("size", [1, 2, 5, 17, 65_537, 364_868_892, 2**32 + 1, 2**61 + 7, 2**62])
def test_permute_equals_its_definition_in_plain_integers(size: int) -> None:
    index = np.random.default_rng(0).integers(0, size, 200)
    index[:2] = 0, size - 1
    for seed, stream, epoch in [(0, 0, 0), (-3, 2, 5), (2**63, 1, 1000)]:
        slow = [_slow_permute(int(x), size, seed, stream, epoch) for x in index]
        assert permute(index, size, seed, stream, epoch).tolist() == slow


def test_the_order_does_not_change_between_versions() -> None:
    """Checkpoints resume in the middle of an order; these numbers may never change."""
    image = permute(np.arange(6), 364_868_892, seed=1234)
    assert image.tolist() == [
        11_922_721,
        306_540_043,
        233_560_126,
        126_054_540,
        84_606_296,
        114_632_392,
    ]


@pytest.mark.parametrize("positions", [range(0), range(55), range(20, 95), [54, 3, 190, 3, 10**12]])
def test_positions_in_any_order_and_over_epochs_equal_the_slow_reference(
    positions: Sequence[int],
) -> None:
    slow = [_slow_permute(p % 55, 55, 7, 0, p // 55) for p in positions]
    order = SampleOrder([30, 25])
    assert order.sample_ids(np.array(positions, np.int64), seed=7).tolist() == slow


def test_permute_depends_on_seed_stream_and_epoch_and_on_nothing_else() -> None:
    index = np.arange(10_000)
    base = permute(index, 10_000, 1, 2, 3)
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        agreement = (permute(index, 10_000, *other) == base).sum()
        assert agreement < 12  # one is expected from independent permutations
    assert np.array_equal(permute(index[::-7], 10_000, 1, 2, 3), base[::-7])


def test_permute_handles_sizes_beyond_32_bits() -> None:
    size = 365_000_000 * 4000
    image = permute(np.arange(size - 1000, size), size, seed=0)
    assert len(np.unique(image)) == 1000
    assert image.min() >= 0 and image.max() < size


def test_permute_spreads_evenly() -> None:
    """Chi-square of the images of a prefix over 100 cells, and of differences of neighbours."""
    size, count = 1_000_000, 50_000
    for seed in range(4):
        image = permute(np.arange(count), size, seed)
        for values in (image, np.diff(image) % size):
            cells = np.bincount(values * 100 // size, minlength=100)
            expected = len(values) / 100
            chi_square = ((cells - expected) ** 2 / expected).sum()
            assert 50 < chi_square < 165  # 99 degrees of freedom, beyond 4 sigma
    assert abs(np.corrcoef(np.arange(count), image)[0, 1]) < 0.03


def test_small_sizes_reach_every_permutation_about_equally_often() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        key = tuple(permute(np.arange(4), 4, seed).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 24
    assert min(seen.values()) > 50 and max(seen.values()) < 160  # 100 expected


def test_every_epoch_holds_every_sample_once_and_epochs_differ() -> None:
    order = SampleOrder([70, 30])
    epochs = order.sample_ids(np.arange(300), seed=5).reshape(3, 100)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(order.sample_ids(np.array([250, 3]), seed=5), epochs.ravel()[[250, 3]])


WEIGHTS = [
    ["0.5", "0.25", "0.25"],
    ["0.7", "0.2", "0.1"],
    ["1", "1", "1"],
    ["52", "1"],
    ["0.333", "0.667"],
    ["1"] * 9 + ["0.001"],
    [str(n) for n in (1, 2, 3, 5, 7, 11, 13, 17, 19, 23)],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "-".join(w[:3]))
def test_every_prefix_of_a_mixture_is_exact_to_less_than_one_sample(weights: list[str]) -> None:
    fractions = [Fraction(weight) for weight in weights]
    sources, counts = mixing_period(fractions)
    total = sum(fractions)
    places = 3 * len(sources)
    drawn = np.tile(sources, 3)
    for source, weight in enumerate(fractions):
        held = np.cumsum(drawn == source)
        wanted = np.arange(1, places + 1) * float(weight / total)
        assert np.abs(held - wanted).max() < 1
        assert np.array_equal(counts[sources == source], np.arange((sources == source).sum()))


def test_random_mixtures_are_exact_too() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        whole = random.integers(1, 60, random.integers(2, 25))
        sources, _ = mixing_period([Fraction(int(w)) for w in whole])
        held = np.cumsum(sources[:, None] == np.arange(len(whole)), axis=0)
        wanted = np.arange(1, len(sources) + 1)[:, None] * (whole / whole.sum())
        assert np.abs(held - wanted).max() < 1


def test_weights_that_cannot_be_met_exactly_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"rounder weights, for example \[3333, 6667\]"):
        mixing_period([Fraction("0.33333333331"), Fraction("0.66666666669")])


def test_a_mixture_is_seekable_and_each_source_runs_through_whole_epochs() -> None:
    sizes = [10, 40, 7]
    order = SampleOrder(sizes, [Fraction(1), Fraction(2), Fraction(1)])
    ids = order.sample_ids(np.arange(400), seed=9)
    assert np.array_equal(order.sample_ids(np.arange(123, 200), seed=9), ids[123:200])
    for first, size, drawn in [(0, 10, 100), (10, 40, 200), (50, 7, 100)]:
        mine = ids[(ids >= first) & (ids < first + size)]
        assert len(mine) == drawn
        for epoch in mine[: drawn // size * size].reshape(-1, size):
            assert sorted(epoch.tolist()) == list(range(first, first + size))
