"""The sample at each position of the training order, shuffled and mixed on the fly.

Nothing is stored: the sample at a position is a function of (seed, position), so a run resumes at
any position at once, on any number of ranks, and memory does not grow with the data.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megalr.errors import UserError

Integers = NDArray[np.int64]
ROUNDS = 8
LARGEST_SIZE = 1 << 62
LONGEST_PERIOD = 1_000_000
_MASK = (1 << 64) - 1


def _scramble(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _round_keys(seed: int, stream: int, epoch: int) -> list[int]:
    key = _scramble(_scramble(_scramble(seed & _MASK) ^ stream) ^ epoch)
    return [_scramble(key ^ number) for number in range(1, ROUNDS + 1)]


def _hash32(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    x = (x ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def permute(index: Integers, size: int, seed: int, stream: int = 0, epoch: int = 0) -> Integers:
    """A pseudo-random bijection of ``0 .. size - 1`` applied to ``index``, element by element.

    ``x = left * b + right`` with ``left`` in ``0 .. a - 1``, ``right`` in ``0 .. b - 1`` and
    ``a b >= size`` runs through a Feistel network whose round functions are keyed on (seed, stream,
    epoch); a result outside ``size`` is permuted again until it falls inside (cycle walking). Since
    ``a b - size < b`` that concerns about one element in ``sqrt(size)``. Source: Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.

    index: int64, any shape, values in ``0 .. size - 1``; the result has the same shape.
    """
    if not 0 < size <= LARGEST_SIZE:
        raise ValueError(f"size {size} is not in 1 .. 2**62")
    b = math.isqrt(size - 1) + 1  # ceil of the square root
    a = -(-size // b)
    keys = _round_keys(seed, stream, epoch)
    result = _feistel(index.astype(np.uint64).ravel(), a, b, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        walked = _feistel(result[outside], a, b, keys)
        result[outside] = walked
        outside = outside[walked >= size]
    return result.astype(np.int64).reshape(index.shape)


def _feistel(x: NDArray[np.uint64], a: int, b: int, keys: list[int]) -> NDArray[np.uint64]:
    size_left, size_right = np.uint64(a), np.uint64(b)
    left = x // size_right
    right = x - left * size_right  # numpy divides by one number several times faster than divmod
    shift = np.uint64(32)
    for number in range(0, ROUNDS, 2):
        # (h * a) >> 32 maps a 32-bit hash to 0 .. a - 1 without a division.
        left += (_hash32(right, keys[number]) * size_left) >> shift
        np.minimum(left, left - size_left, out=left)  # modulo: below 0 wraps to a large number
        right += (_hash32(left, keys[number + 1]) * size_right) >> shift
        np.minimum(right, right - size_right, out=right)
    return left * size_right + right


def mixing_period(weights: Sequence[Fraction]) -> tuple[NDArray[np.int32], Integers]:
    """One period of a mixture: the source at each place, and its number of earlier occurrences.

    With ``w_d`` = weight / sum of weights and ``Q`` the smallest number for which all ``w_d Q`` are
    whole, place ``n`` (from 0) goes, among the sources whose next sample may come already
    (``count_d < w_d (n + 1)``), to the one whose next sample is due first, at ``(count_d + 1) /
    w_d``. Then every prefix of n samples holds each source ``w_d n`` times to within less than
    one. Source: Tijdeman, "The chairman assignment problem", Discrete Math. 32 (1980).

    Returns int32 (Q,) sources and int64 (Q,) counts. Raises UserError if Q exceeds 1,000,000.
    """
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        suggestion = [max(1, round(share * 10_000)) for share in shares]
        raise UserError(
            f"data weights {[str(weight) for weight in weights]} need a period of {period} samples "
            f"to be met exactly, at most {LONGEST_PERIOD} are possible; give rounder weights, for "
            f"example {suggestion}"
        )
    sources = np.empty(period, np.int32)
    counts = np.empty(period, np.int64)
    whole = [int(share * period) for share in shares]
    taken = [0] * len(whole)
    ready: list[tuple[int, int]] = []
    waiting = [(0, source) for source in range(len(whole))]
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            source = heapq.heappop(waiting)[1]
            due = -(-(taken[source] + 1) * period // whole[source])
            heapq.heappush(ready, (due, source))
        source = heapq.heappop(ready)[1]
        sources[place], counts[place] = source, taken[source]
        taken[source] += 1
        # count < w (n + 1)  <=>  count Q < whole (n + 1)  <=>  n >= floor(count Q / whole)
        heapq.heappush(waiting, (taken[source] * period // whole[source], source))
    return sources, counts


class SampleOrder:
    """The order of the samples of one or several sources.

    Without weights the sources are one pool: position p belongs to epoch ``p // N`` and every epoch
    is a different permutation of all N samples. With weights each source has its own epochs and
    permutations, and the places are assigned by :func:`mixing_period`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction] | None = None) -> None:
        self._sizes = list(sizes)
        self._firsts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self._period = None if weights is None else mixing_period(weights)
        if self._period is not None:
            sources, _ = self._period
            self._per_period = np.bincount(sources, minlength=len(sizes)).astype(np.int64)

    def sample_ids(self, positions: Integers, seed: int) -> Integers:
        """Sample numbers (0 .. N - 1 over all sources) at the given positions; int64, (n,)."""
        if self._period is None:
            return _epochs(positions, int(self._firsts[-1]), seed, stream=0)
        sources, counts = self._period
        cycles, places = np.divmod(positions, len(sources))
        chosen = sources[places]
        within = cycles * self._per_period[chosen] + counts[places]
        result = np.empty_like(positions)
        for source in np.unique(chosen):
            here = chosen == source
            ids = _epochs(within[here], self._sizes[source], seed, stream=int(source))
            result[here] = ids + self._firsts[source]
        return result


def _epochs(positions: Integers, size: int, seed: int, stream: int) -> Integers:
    epochs, places = np.divmod(positions, size)
    if len(epochs) and epochs.min() == epochs.max():  # the usual case
        return permute(places, size, seed, stream, int(epochs[0]))
    result = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permute(places[here], size, seed, stream, int(epoch))
    return result
