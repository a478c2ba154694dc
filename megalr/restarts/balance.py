"""Balanced factors of a product, from r x r matrices, without ever forming the product.

For B (m, r) and A (r, n) with the singular value decomposition BA = U S Vᵀ the balanced factors are

    B' = U S^(1/2),   A' = S^(1/2) Vᵀ,   so that   B'A' = BA   and   B'ᵀB' = A'A'ᵀ = S

("weight refactorization", arXiv 2505.22922). Two ways lead there:

* Gram path, batched. Scale the columns of B to norm one, B = B̂D. With the Gram matrices of B̂ and A,
  the Cholesky factor B̂ᵀB̂ = LLᵀ (so B = QLᵀD, Q orthonormal) and the symmetric eigenproblem
  LᵀD(AAᵀ)DL = V S² Vᵀ, the factors are B' = B T and A' = T⁻¹ A with
  T = D⁻¹L⁻ᵀ V S^(1/2) and T⁻¹ = S^(-1/2) VᵀLᵀD. Everything but the last two products is r x r.
* QR path, one matrix at a time, where the first cannot be used: B̂ = Q₁R₁, (DA)ᵀ = Q₂R₂ and the SVD
  R₁R₂ᵀ = Ū S V̄ᵀ give B' = Q₁Ū S^(1/2), A' = S^(1/2) V̄ᵀQ₂ᵀ, whatever the rank of B and A.

A Gram matrix squares condition numbers, so the first way is taken only where its own r x r numbers
promise an error below fp32 rounding; Cholesky failures are part of that test, nothing raises. All
arithmetic is float64. Singular values descend. Signs: the largest entry of each column of BᵀB' is
positive, i.e. a new direction has the sign of the old one that it overlaps most; factors that
are balanced already come back unchanged.

Factors may be split over a process group, B by rows, A by columns: only r x r numbers are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.layers.latent_residual import LatentResidual
from megalr.restarts.batched_eigh import eigh

Group = dist.ProcessGroup | None
Carry = Callable[[int, Tensor, Tensor], None]
"""Given the index of a pair, t_b and t_a."""

# Largest ||G|| * trace(G^-1) of the column-scaled Gram matrix G = B̂ᵀB̂ that the Gram path accepts.
# 2.2e-16 times this bounds the loss of orthogonality by 2e-5; measured at the limit it is 2e-12
# (r = 128), far below fp32 rounding (6e-8), and Cholesky cannot fail before 1e15.
_MAX_GRAM_CONDITION = 1e11
# Smallest ratio of the eigenvalues S² that it accepts (singular values within 3e5 of each other):
# eigh leaves an absolute error of some 1e-16 max(S²), which in the balance is seen as
# 1e-16 max(S)/min(S) (measured at the limit: 5e-12).
_MIN_EIGENVALUE_RATIO = 1e-11
# A re-seeded direction gets a row of A (or column of B) with squared norm
# _SEED_SHARE * ||S|| / sqrt(count): the balance stays below 1e-7 ||S||, and the zero side gets a
# gradient that Adam can use.
_SEED_SHARE = 2e-8
# Norm of a row of A drawn as the low-rank method draws it, U(-1/sqrt(n), 1/sqrt(n)): for a product
# whose factors are both zero there is no other scale.
_ZERO_PRODUCT_SEED_NORM = 3.0**-0.5


@dataclass(frozen=True)
class Transforms:
    """Batched r x r matrices of the Gram path: B' = B @ t_b, A' = t_a @ A where ``reliable``."""

    t_b: Tensor  # (k, r, r) float64
    t_a: Tensor  # (k, r, r) float64, the inverse of t_b
    singular_values: Tensor  # (k, r) float64, descending
    reliable: Tensor  # (k,) bool; False: take the QR path


@dataclass(frozen=True)
class Balanced:
    """Balanced factors of one product, and counts of the directions that are zero.

    For the live directions B' = B @ t_b and A' = t_a @ A; the columns of t_b and the rows of t_a
    that belong to dead ones are zero. Both are the identity for factors that were left alone.
    """

    b: Tensor  # (m, r), dtype of the given factor
    a: Tensor  # (r, n), dtype of the given factor
    t_b: Tensor  # (r, r) float64
    t_a: Tensor  # (r, r) float64
    singular_values: Tensor  # (r,) float64, descending, of the product of all shards
    by_qr: bool
    dead: int  # directions whose singular value is zero (to float64 rounding)
    reseeded: int  # dead directions that were given a new non-zero row of A or column of B


@dataclass(frozen=True)
class PairOutcome:
    """What was found while one pair was balanced; tensors on the device of the factors."""

    singular_values: Tensor  # (r,) float64, descending, of BA
    imbalance: Tensor  # () float64, of the factors before, see :func:`imbalance`
    by_qr: bool = False
    dead: int = 0  # directions whose singular value is zero
    reseeded: int = 0  # of these, given a new non-zero row of A or column of B


def gram(factor: Tensor, group: Group = None) -> Tensor:
    """``factorᵀ factor`` (r, r), float64, of a tall factor (rows, r) split by rows over a group."""
    tall = factor.double()
    product = tall.mT @ tall
    if group is not None:
        dist.all_reduce(product, group=group)
    return product


def balancing_transforms(gram_b: Tensor, gram_a: Tensor) -> Transforms:
    """The Gram path: T and its inverse from BᵀB and AAᵀ, both (k, r, r) float64.

    Where ``reliable`` is False the other outputs of that matrix are finite but meaningless.
    """
    rank = gram_b.shape[-1]
    identity = torch.eye(rank, dtype=gram_b.dtype, device=gram_b.device).expand_as(gram_b)
    norms = gram_b.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # (k, r) column norms of B
    norms = torch.where(norms > 0, norms, 1.0)
    scaled = gram_b / (norms.unsqueeze(-1) * norms.unsqueeze(-2))  # unit diagonal

    lower, failed = torch.linalg.cholesky_ex(scaled)
    usable = (failed == 0) & (lower + gram_a).isfinite().all(dim=(-2, -1))
    lower = torch.where(usable[:, None, None], lower, identity)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    condition = torch.linalg.matrix_norm(scaled) * inverse.square().sum(dim=(-2, -1))
    usable &= condition < _MAX_GRAM_CONDITION  # False for NaN as well

    lower = lower * norms.unsqueeze(-1)  # D L
    core = lower.mT @ gram_a @ lower
    core = torch.where(usable[:, None, None], (core + core.mT) / 2, identity)
    eigenvalues, vectors = eigh(core)  # ascending
    eigenvalues, vectors = eigenvalues.flip(-1), vectors.flip(-1)
    reliable = usable & (eigenvalues[:, -1] > _MIN_EIGENVALUE_RATIO * eigenvalues[:, 0])

    singular = eigenvalues.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    root = singular.sqrt()
    t_a = (vectors.mT @ lower.mT) / root.unsqueeze(-1)
    t_b = (inverse.mT @ vectors) / norms.unsqueeze(-1) * root.unsqueeze(-2)
    # BᵀB' = D L V S^(1/2) = t_aᵀ S: column i of it and row i of t_a have their signs in common.
    signs = _signs_of_largest(t_a)
    return Transforms(t_b * signs.unsqueeze(-2), t_a * signs.unsqueeze(-1), singular, reliable)


def balanced_factors(
    b: Tensor, a: Tensor, *, b_group: Group = None, a_group: Group = None
) -> Balanced:
    """Balanced factors of ``b @ a`` for b (m, r) and a (r, n), results in the dtype of the inputs.

    ``b_group``: the ranks over which B is split by rows (None: whole here); ``a_group``: those over
    which A is split by columns. A factor without a group must be the same on all ranks of the
    other's group, and comes back the same bit for bit. Raises ValueError for factors that are not
    finite.
    """
    transforms = balancing_transforms(gram(b, b_group)[None], gram(a.mT, a_group)[None])
    for tensor in (transforms.t_b, transforms.t_a, transforms.singular_values):
        _make_equal(tensor, b_group, a_group)
    flag = _make_equal(transforms.reliable.to(torch.int32), b_group, a_group)
    if not flag.item():
        return balanced_factors_by_qr(b, a, b_group=b_group, a_group=a_group)
    t_b, t_a, singular = transforms.t_b[0], transforms.t_a[0], transforms.singular_values[0]
    new_b, new_a = (b.double() @ t_b).to(b.dtype), (t_a @ a.double()).to(a.dtype)
    return Balanced(new_b, new_a, t_b, t_a, singular, by_qr=False, dead=0, reseeded=0)


def balanced_factors_by_qr(
    b: Tensor, a: Tensor, *, b_group: Group = None, a_group: Group = None
) -> Balanced:
    """The QR path of :func:`balanced_factors`: any rank, any scaling.

    A direction whose singular value is zero would give a zero column of B' and a zero row of A',
    which no gradient can leave. It gets instead a small row of A' orthogonal to all others (or a
    column of B' where A has no room), the other factor staying zero: BA does not change. A product
    that is zero altogether is left alone when one factor is not (gradients reach the other one),
    and gets an A of orthogonal rows when both are zero. Rows of B and columns of A that are
    entirely zero (padding) stay exactly zero.
    """
    tall_b, tall_a = b.double(), a.double().mT  # (m, r), (n, r)
    rank = b.shape[1]
    norms = _column_norms(tall_b, b_group)  # (r,)
    norms_a = _column_norms(tall_a, a_group)
    if not bool((norms + norms_a).isfinite().all()):
        raise ValueError("the factors hold values that are not finite")
    largest = (norms * norms_a).max()
    # A zero column of B keeps the direction of its row of A, at the scale of the others.
    scale = torch.where(norms > 0, norms, largest / torch.where(norms_a > 0, norms_a, 1.0))
    q_b, r_b = _tall_qr(tall_b / torch.where(norms > 0, norms, 1.0), b_group)
    q_a, r_a = _tall_qr(tall_a * scale, a_group)
    u, singular, vt = torch.linalg.svd(r_b @ r_a.mT)
    u, singular, vt = (_make_equal(x.contiguous(), b_group, a_group) for x in (u, singular, vt))

    epsilon = torch.finfo(torch.float64).eps
    noise = 10 * epsilon * torch.linalg.norm(r_b) * torch.linalg.norm(r_a)
    if bool(singular[0] <= noise):
        return _zero_product(b, a, norms, norms_a, q_a, vt)
    live = singular > torch.maximum(noise, 10 * rank * epsilon * singular[0])
    root = torch.where(live, singular, 0.0).sqrt()
    overlap = norms.unsqueeze(-1) * (r_b.mT @ (u * root))  # BᵀB'
    signs = torch.where(live, _signs_of_largest(overlap.mT), _signs_of_largest(vt))
    new_b = q_b @ (u * (root * signs))
    new_a = (q_a @ (vt.mT * (root * signs))).mT
    # With S of the live directions: t_b = AA'ᵀ S⁻¹ and t_a = S⁻¹ B'ᵀB, whatever the rank of B, A.
    inverse = torch.where(live, 1 / singular, 0.0)
    t_b = r_a.mT @ (vt.mT * (root * signs * inverse)) / scale.unsqueeze(-1)
    t_a = (overlap * (signs * inverse)).mT
    # Exactly zero rows and columns stay so: these are the padding of the matrix.
    support_b = (tall_b != 0).any(dim=1, keepdim=True)  # (m, 1)
    support_a = (tall_a != 0).any(dim=1, keepdim=True)  # (n, 1)
    new_b, new_a = new_b * support_b, new_a * support_a.mT

    dead = rank - int(live.sum())
    reseeded = 0
    if dead:
        seed_norm = (_SEED_SHARE * torch.linalg.norm(singular) / math.sqrt(dead)).sqrt()
        seed_a = q_a @ vt.mT[:, ~live] * support_a  # (n, dead)
        seed_b = q_b @ u[:, ~live] * support_b  # (m, dead)
        room_a = _column_norms(seed_a, a_group) > 0.5
        room_b = (_column_norms(seed_b, b_group) > 0.5) & ~room_a
        new_a[~live] = (seed_a * (seed_norm * room_a)).mT
        new_b[:, ~live] = seed_b * (seed_norm * room_b)
        reseeded = int((room_a | room_b).sum())
    singular = torch.where(live, singular, 0.0)
    new_b, new_a = new_b.to(b.dtype), new_a.to(a.dtype)
    return Balanced(new_b, new_a, t_b, t_a, singular, True, dead, reseeded)


def balance_in_place(
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    workspace_bytes: int,
    shards: Sequence[tuple[bool, bool]] | None = None,
    group: Group = None,
    carry: Carry | None = None,
    residuals: Sequence[LatentResidual | None] | None = None,
) -> list[PairOutcome]:
    """Replace the factors of every pair (B (m, r), A (r, n)) by balanced ones.

    Where B has a fixed offset E it is B + E that is balanced with A, in float64: B' is the new
    B + E less E, so that (B' + E) A' = (B + E) A.

    Matrices of equal rank share one batched r x r computation, as many at a time as fit into
    ``workspace_bytes``; the tall products are made one matrix at a time.

    Args:
        pairs: the factors; over a group, this rank's rows of B and columns of A.
        workspace_bytes: size of a batch's r x r matrices.
        shards: for each pair whether B is split by rows, and A by columns, over ``group``.
        group: the ranks that hold parts of the same pairs, all of which call this.
        carry: called once per pair with its index, t_b and t_a (see :class:`Balanced`).
        residuals: E of each pair, the rows given here; None: zero.

    Returns:
        What was found for each pair.
    """
    if group is None or shards is None:
        shards = [(False, False)] * len(pairs)
    residuals = [None] * len(pairs) if residuals is None else residuals
    outcomes: dict[int, PairOutcome] = {}
    for rank in sorted({b.shape[1] for b, _ in pairs}):
        same = [index for index, (b, _) in enumerate(pairs) if b.shape[1] == rank]
        # Ten r x r float64 matrices are alive at once for each matrix of a batch.
        batch = max(1, workspace_bytes // (80 * rank * rank))
        for start in range(0, len(same), batch):
            chunk = same[start : start + batch]
            outcomes |= zip(
                chunk, _balance_batch(chunk, pairs, residuals, shards, group, carry), strict=True
            )
    return [outcomes[index] for index in range(len(pairs))]


def _balance_batch(
    chunk: Sequence[int],
    pairs: Sequence[tuple[Tensor, Tensor]],
    residuals: Sequence[LatentResidual | None],
    shards: Sequence[tuple[bool, bool]],
    group: Group,
    carry: Carry | None,
) -> list[PairOutcome]:
    """:func:`balance_in_place` for the pairs of one rank r with indices ``chunk``, as one batch."""
    gram_b = _grams(
        ((with_residual(pairs[i][0], residuals[i]), shards[i][0]) for i in chunk), group
    )
    gram_a = _grams(((pairs[i][1].mT, shards[i][1]) for i in chunk), group)
    before = imbalance(gram_b, gram_a)
    transforms = balancing_transforms(gram_b, gram_a)
    for tensor in (transforms.t_b, transforms.t_a):
        _make_equal(tensor, group)
    flags = _make_equal(transforms.reliable.to(torch.int32), group)
    outcomes = []
    for place, (index, reliable) in enumerate(zip(chunk, flags.tolist(), strict=True)):
        (b, a), (b_split, a_split) = pairs[index], shards[index]
        residual, whole_b = residuals[index], with_residual(b, residuals[index])
        t_b, t_a = transforms.t_b[place], transforms.t_a[place]
        if reliable:
            new_b = whole_b.double() @ t_b
            a.copy_(t_a @ a.double())
            found = PairOutcome(transforms.singular_values[place], before[place])
        else:
            result = balanced_factors_by_qr(
                whole_b, a, b_group=group if b_split else None, a_group=group if a_split else None
            )
            new_b = result.b
            a.copy_(result.a)
            t_b, t_a = result.t_b, result.t_a
            counts = (True, result.dead, result.reseeded)
            found = PairOutcome(result.singular_values, before[place], *counts)
        b.copy_(new_b if residual is None else residual.add_to(new_b, -1.0))
        outcomes.append(found)
        if carry is not None:
            carry(index, t_b, t_a)
    return outcomes


def with_residual(b: Tensor, residual: LatentResidual | None) -> Tensor:
    """B + E in float64; ``b`` itself without E."""
    return b if residual is None else residual.add_to(b.to(torch.float64, copy=True))


def _grams(factors: Iterable[tuple[Tensor, bool]], group: Group) -> Tensor:
    """Gram matrices (k, r, r) of tall factors, each with whether it is split by rows; one sum."""
    found = [(gram(factor), split) for factor, split in factors]
    grams = torch.stack([one for one, _ in found])
    if group is None:
        return grams
    if dist.get_rank(group) > 0:  # one term is enough where every rank has the whole factor
        split = torch.tensor([split for _, split in found], device=grams.device)
        grams *= split[:, None, None]
    dist.all_reduce(grams, group=group)
    return grams


def imbalance(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """``||BᵀB - AAᵀ|| / (||BᵀB|| + ||AAᵀ||)`` in [0, 1] for (..., r, r); 0 when both are zero."""
    difference = torch.linalg.matrix_norm(gram_b - gram_a)
    total = torch.linalg.matrix_norm(gram_b) + torch.linalg.matrix_norm(gram_a)
    return torch.where(total > 0, difference / total, 0.0)


def _zero_product(
    b: Tensor, a: Tensor, norms_b: Tensor, norms_a: Tensor, q_a: Tensor, vt: Tensor
) -> Balanced:
    rank = b.shape[1]
    zeros = torch.zeros(rank, dtype=torch.float64, device=b.device)
    if bool((norms_b > 0).any()) or bool((norms_a > 0).any()):
        same = torch.eye(rank, dtype=torch.float64, device=b.device)
        return Balanced(b.clone(), a.clone(), same, same, zeros, True, dead=rank, reseeded=0)
    seeded = (q_a @ vt.mT).mT * _ZERO_PRODUCT_SEED_NORM
    none = zeros.new_zeros(rank, rank)
    return Balanced(b.clone(), seeded.to(a.dtype), none, none, zeros, True, rank, rank)


def _tall_qr(tall: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Thin QR of (rows, r) split by rows over ranks: Q (rows, r) of this rank, the common R (r, r).

    Rows may be fewer than r: Q then has zero columns and R zero rows. Over a group each rank
    factors its rows, the small R are stacked and factored again (TSQR, Demmel et al. 2012), which
    unlike tall @ R⁻¹ is stable for any rank.
    """
    rank = tall.shape[1]
    q, r = torch.linalg.qr(tall)
    if (missing := rank - q.shape[1]) > 0:
        q = torch.nn.functional.pad(q, (0, missing))
        r = torch.nn.functional.pad(r, (0, 0, 0, missing))
    if group is None:
        return q, r
    place = dist.get_rank(group)
    stack = r.new_zeros(dist.get_world_size(group), rank, rank)
    stack[place] = r
    dist.all_reduce(stack, group=group)  # a gather: all other slots are zero
    q_stack, r = torch.linalg.qr(stack.view(-1, rank))
    q_stack = _make_equal(q_stack.contiguous(), group, None)
    return q @ q_stack.view(-1, rank, rank)[place], _make_equal(r.contiguous(), group, None)


def _column_norms(tall: Tensor, group: Group) -> Tensor:
    squares = tall.square().sum(dim=0)
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


def _signs_of_largest(rows: Tensor) -> Tensor:
    """+1 or -1 for each row: the sign of its entry of largest magnitude, the first of equals."""
    largest = rows.abs().argmax(dim=-1, keepdim=True)
    return torch.where(rows.gather(-1, largest).squeeze(-1) < 0, -1.0, 1.0).to(rows.dtype)


def _make_equal(tensor: Tensor, *groups: Group) -> Tensor:
    """Give all ranks the first rank's bits: equal inputs need not round equally on every device."""
    for group in {id(g): g for g in groups if g is not None}.values():
        dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    return tensor
