"""Low-rank projections of a gradient matrix: which side, which basis, there and back.

For G of shape (m, n) and rank r (docs/methods/projected.md):

* right: P (n, r), R = G P (m, r), back R P^T;  left: P (m, r), R = P^T G (r, n), back P R;
* full: both, R = P^T G Q (r, r), back P R Q^T.

``std`` takes the side that makes R large in the long dimension (m >= n: right), ``reverse_std``
the other one. Bases have orthonormal columns, except APOLLO's random one.

Rows of a basis that meet an entirely zero row or column of G are set to zero: for directions with a
positive singular value they are zero anyway, and padded rows and columns of a weight must stay
exactly zero whatever the null space of G looks like.
"""

from __future__ import annotations

import math

import torch

OVERSAMPLING = 16
POWER_ITERATIONS = 3
COLD_ITERATIONS = 4
# Below this size the full SVD costs no more than the iteration and is exact.
SMALL_SIDE = 128


def side_of(shape: tuple[int, ...], proj_type: str) -> str:
    """``left``, ``right`` or ``full`` for a matrix of this shape; square counts as m >= n."""
    tall = shape[0] >= shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type


def basis_size(shape: tuple[int, ...], side: str) -> int:
    """Rows of the basis P of one side: the dimension of W that it projects."""
    return shape[1] if side == "right" else shape[0]


def project(grad: torch.Tensor, basis: torch.Tensor, side: str) -> torch.Tensor:
    """R for a one-sided basis P: G P (m, r) or P^T G (r, n)."""
    return grad @ basis if side == "right" else basis.mT @ grad


def back_project(low: torch.Tensor, basis: torch.Tensor, side: str) -> torch.Tensor:
    """R P^T or P R, of the gradient's shape."""
    return low @ basis.mT if side == "right" else basis @ low


def _zero_rows_of(grad: torch.Tensor, side: str) -> torch.Tensor:
    """1.0 for each coordinate of the projected side along which G is not entirely zero."""
    return grad.abs().amax(dim=0 if side == "right" else 1).ne(0).to(grad.dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def svd_bases(grad: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U_r (m, r), V_r (n, r)): leading singular vectors by a full SVD in fp32, as published."""
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    return left[:, :rank], right[:rank].mT


def _cholesky_qr(columns: torch.Tensor, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(orthonormal basis of the column space, zero or the code of a failure), in float64.

    Cholesky-QR: much faster than Householder QR on a GPU. One pass keeps columns independent, the
    second makes them orthogonal to rounding. It fails where a column depends on the others.
    """
    result = columns.double()
    result = result / result.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    failed = torch.zeros((), dtype=torch.int32, device=columns.device)
    for _ in range(passes):
        factor, info = torch.linalg.cholesky_ex(result.mT @ result)
        result = torch.linalg.solve_triangular(factor.mT, result, upper=True, left=False)
        failed = failed | info
    return result.to(columns.dtype), failed


def _iterate(matrix: torch.Tensor, columns: torch.Tensor, rounds: int) -> torch.Tensor:
    """``rounds`` of orthonormalized power iteration with M^T M; orthonormal columns."""
    start, failed = columns, torch.zeros((), dtype=torch.int32, device=columns.device)
    for i in range(rounds):
        passes = 2 if i == rounds - 1 else 1
        columns, info = _cholesky_qr(matrix.mT @ (matrix @ columns), passes)
        failed = failed | info
    if int(failed) == 0:
        return columns
    columns = start
    for _ in range(rounds):  # the matrix has a rank below the number of columns
        columns = torch.linalg.qr(matrix.mT @ (matrix @ columns)).Q
    return columns


def subspace_basis(
    grad: torch.Tensor, rank: int, side: str, start: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """Leading singular vectors of one side by randomized subspace iteration.

    ``start`` (the previous basis, d x r, or None) warms the iteration up; ``OVERSAMPLING`` more
    columns come from a generator seeded with ``seed``. After 3 rounds (4 without a start) with
    G^T G (or G G^T) a Rayleigh-Ritz step turns the subspace into singular vectors in order, as
    Adam is not invariant to rotations; vectors point along their predecessors, as moments are
    carried over from one basis to the next. Cost O(m n r); nothing larger than r + 16 is
    factorized.
    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4.
    """
    matrix = grad.to(_work_dtype(grad.dtype))
    matrix = matrix if side == "right" else matrix.mT  # columns: the projected side
    size = matrix.shape[1]
    width = min(size, rank + OVERSAMPLING)
    generator = torch.Generator().manual_seed(seed)
    fresh = width if start is None else width - rank
    columns = torch.randn(size, fresh, generator=generator, dtype=torch.float32)
    columns = columns.to(matrix.device, matrix.dtype)
    if start is not None:
        columns = torch.cat([start.to(matrix.dtype), columns / math.sqrt(size)], dim=1)
    rounds = COLD_ITERATIONS if start is None else POWER_ITERATIONS
    columns = _iterate(matrix, columns, rounds)
    image = (matrix @ columns).double()
    _, rotation = torch.linalg.eigh(image.mT @ image)
    leading = rotation.flip(-1)[:, :rank].to(matrix.dtype)
    basis = columns @ leading
    if start is not None:
        overlap = (basis * start.to(basis.dtype)).sum(dim=0)
        basis = basis * torch.where(overlap < 0, -1.0, 1.0).to(basis.dtype)
    return basis


def leading_bases(
    grad: torch.Tensor,
    rank: int,
    side: str,
    basis: str = "auto",
    start: tuple[torch.Tensor, ...] | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Bases of the leading singular vectors for ``side`` (two of them, left and right, for full).

    ``basis`` is ``svd`` (full SVD), ``subspace`` (the iteration above) or ``auto``: the iteration
    where it pays, that is when the smaller side exceeds 128 and the rank is at most three quarters
    of it. Returned in the gradient's dtype.
    """
    small = min(grad.shape)
    if basis == "svd" or (basis == "auto" and (small <= SMALL_SIDE or 4 * rank > 3 * small)):
        left, right = svd_bases(grad, rank)
        found = {"left": (left,), "right": (right,), "full": (left, right)}[side]
    else:
        sides = ("left", "right") if side == "full" else (side,)
        found = tuple(
            subspace_basis(grad, rank, one, None if start is None else start[i], seed + i)
            for i, one in enumerate(sides)
        )
    sides = ("left", "right") if side == "full" else (side,)
    return tuple(
        (vectors.to(grad.dtype) * _zero_rows_of(grad, one)[:, None]).contiguous()
        for vectors, one in zip(found, sides, strict=True)
    )


def next_seed(seed: int) -> int:
    """APOLLO's seed chain: the 15th draw of randint[0, 2^63 - 1) of a generator seeded so."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, 2**63 - 1, (15,), generator=generator)[-1])


def gaussian_basis(grad: torch.Tensor, rank: int, side: str, seed: int) -> torch.Tensor:
    """APOLLO's random projection, entries N(0, 1) / sqrt(r): left (m, r), right (n, r).

    Drawn in the gradient's dtype by a generator on the gradient's device; the right one as an
    (r, n) matrix, as published, and transposed here.
    """
    size = basis_size(tuple(grad.shape), side)
    shape = (rank, size) if side == "right" else (size, rank)
    generator = torch.Generator(device=grad.device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device=grad.device, dtype=grad.dtype)
    drawn = drawn / math.sqrt(rank)
    return drawn.mT if side == "right" else drawn


def random_orthonormal_basis(grad: torch.Tensor, rank: int, side: str, seed: int) -> torch.Tensor:
    """A uniformly random basis with orthonormal columns: the polar factor of a Gaussian (§11).

    Z (Z^T Z)^(-1/2) in float64 from a CPU generator, so equal on every device.
    """
    size = basis_size(tuple(grad.shape), side)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(grad.device)
    normal = normal * _zero_rows_of(grad, side)[:, None]
    values, vectors = torch.linalg.eigh(normal.mT @ normal)
    safe = values > 1e-12 * values[-1]  # fewer non-zero rows than r: drop what is not there
    inverse_root = torch.where(safe, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    return (normal @ (vectors * inverse_root) @ vectors.mT).to(grad.dtype)


def mixed_seed(seed: int, number: int, refresh: int) -> int:
    """A seed for refresh ``refresh`` of tensor ``number``, the same whoever owns the tensor."""
    return ((seed * 1_000_003 + number) * 1_000_003 + refresh) % (2**63 - 1)


def refresh_due(done: int, gap: int, number: int, stagger: bool) -> bool:
    """Whether a projector is renewed before update ``done`` (zero-based).

    Every ``gap`` updates; with ``stagger`` at a phase of its own for every tensor, taken from a
    low-discrepancy sequence so that the refreshes of any run of tensors are spread evenly.
    """
    phase = int((number * 0.6180339887498949) % 1.0 * gap) if stagger else 0
    return (done + phase) % gap == 0
