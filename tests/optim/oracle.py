"""The update rules written down a second time, in numpy, straight from their formulas.

Every function takes the first weight, the gradients of all updates and the options by the names of
the papers, and returns the weight after each update. The only thing shared with the package is the
call that finds singular vectors (their signs belong to LAPACK).
"""

from __future__ import annotations

import math

import numpy as np
import torch


def weight(m, n):
    i, j = np.arange(m)[:, None], np.arange(n)[None]
    return 0.1 * np.cos(0.5 * i - 0.3 * j + 0.2 * i * j)


def gradient(t, m, n, k=0.0):
    i, j = np.arange(m)[:, None], np.arange(n)[None]
    wave = np.sin(1.7 * i + 0.9 * j * (i + 1) + 0.37 * t * (j + 2) + k)
    return wave + 0.3 * np.cos(0.11 * (i + 1) * (j + 3) * (t + 1) + k)


def gradients(updates, m, n, k=0.0):
    return [gradient(t, m, n, k) for t in range(updates)]


def singular_vectors(g, r):
    u, _, vh = torch.linalg.svd(torch.from_numpy(g).float(), full_matrices=False)
    return u[:, :r].double().numpy(), vh[:r].double().numpy().T


class AdamH:
    """m, v, k and N of the HF-style Adam."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-6):
        self.b1, self.b2, self.eps, self.k, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g):
        self.k += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        return self.m / (np.sqrt(self.v) + self.eps)

    def rate(self, lr):
        return lr * math.sqrt(1 - self.b2**self.k) / (1 - self.b1**self.k)


class Limiter:
    def __init__(self):
        self.p = None

    def __call__(self, e):
        norm = np.sqrt((e * e).sum())
        if self.p is None:
            self.p = norm
            return e
        ell = max(norm / (self.p + 1e-8), 1.01) / 1.01
        self.p = norm / ell
        return e / ell


def side_of(shape, proj_type):
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def adam_h(w, grads, lr, wd=0.0):
    adam, out = AdamH(), []
    for g in grads:
        n = adam(g)
        w = w - adam.rate(lr) * n
        w = w - lr * wd * w
        out.append(w)
    return out


def galore(w, grads, lr, rank, gap, scale, proj_type="std", wd=0.0, nl=False):
    adam, limiter, out = AdamH(), Limiter(), []
    side = side_of(w.shape, proj_type)
    for t, g in enumerate(grads):
        if t % gap == 0:
            left, right = singular_vectors(g, rank)
        if side == "right":
            u = scale * (adam(g @ right) @ right.T)
        elif side == "left":
            u = scale * (left @ adam(left.T @ g))
        else:
            u = scale * (left @ adam(left.T @ g @ right) @ right.T)
        if nl:
            u = limiter(u)
        w = w - adam.rate(lr) * u
        w = w - lr * wd * w
        out.append(w)
    return out


def fira(w, grads, lr, rank, gap, scale, proj_type="std", wd=0.0, nl=True, published=True):
    adam, limiter, out = AdamH(), Limiter(), []
    side = side_of(w.shape, proj_type)
    for t, g in enumerate(grads):
        if t % gap == 0:
            left, right = singular_vectors(g, rank)
        if side == "right":
            low, axis = g @ right, 1
        else:
            low, axis = left.T @ g, 0
        n = adam(low)

        def back(x, side=side, left=left, right=right):
            return x @ right.T if side == "right" else left @ x

        def length(x, axis=axis):
            return np.sqrt((x * x).sum(axis=axis, keepdims=True))

        phi = length(n) / (length(low) + 1e-8)
        e = (g - (scale if published else 1.0) * back(low)) * phi
        if nl:
            e = limiter(e)
        w = w - adam.rate(lr) * (scale * back(n) + e)
        w = w - lr * wd * w
        out.append(w)
    return out


def seed_after(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = 0
    for _ in range(15):
        drawn = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
    return drawn


def apollo(
    w, grads, lr, rank, gap, scale, scale_type="channel", front=False, proj="random",
    proj_type="std", wd=0.0, nl=True, number=1,
):  # fmt: skip
    adam, limiter, out, seed = AdamH(), Limiter(), [], None
    side, (m, n) = side_of(w.shape, proj_type), w.shape
    for t, g in enumerate(grads):
        if t % gap == 0:
            if proj == "svd":
                left, right = singular_vectors(g, rank)
            else:
                seed = number if seed is None else seed_after(seed)
                generator = torch.Generator().manual_seed(seed)
                shape = (m, rank) if side == "left" else (rank, n)
                z = torch.randn(shape, generator=generator, dtype=torch.float64).numpy()
                left = right = z / math.sqrt(rank)
                right = right.T
        low = g @ right if side == "right" else left.T @ g
        nn = adam(low)
        if scale_type == "tensor":
            s = np.sqrt((nn**2).sum()) / (np.sqrt((low**2).sum()) + 1e-8)
        else:
            axis = 1 if side == "right" else 0
            s = np.sqrt((nn**2).sum(axis=axis, keepdims=True))
            s = s / (np.sqrt((low**2).sum(axis=axis, keepdims=True)) + 1e-8)
        u = g * s
        if front:
            u = math.sqrt(scale) * u
        if nl:
            u = limiter(u)
        if not front:
            u = math.sqrt(scale) * u
        w = w - adam.rate(lr) * u
        w = w - lr * wd * w
        out.append(w)
    return out


def golore_factor_form(w, grads, lr, rank, gap, total, ratio, basis):
    """W_eff = W - A B with a trained factor and a projector, as the published code stores it."""
    m, n = w.shape
    tall = m >= n
    a, b = np.zeros((m, rank)), np.zeros((rank, n))
    adam, out = AdamH(), []
    for u, d in enumerate(grads):
        if u % gap == 0:
            w = w - a @ b
            if u / total < ratio:
                left, right = singular_vectors(d, rank)
                q = right.T if tall else left  # (r, n) or (m, r)
            else:
                q = basis(u, d)
            if tall:
                adam.m = (adam.m @ b) @ q.T if u else 0.0
                a, b = np.zeros((m, rank)), q
            else:
                adam.m = q.T @ (a @ adam.m) if u else 0.0
                a, b = q, np.zeros((rank, n))
        g = -(d @ b.T) if tall else -(a.T @ d)
        step = adam(g)
        if tall:
            a = a - adam.rate(lr) * step
        else:
            b = b - adam.rate(lr) * step
        out.append(w - a @ b)
    return out


def spam(w, grads, lr, theta, gap, warmup, accu=20, wd=0.0, published=True, eps=1e-6):
    b1, b2 = 0.9, 0.999
    m = v = np.zeros_like(w)
    c, out = warmup + 1, []
    for j, g in enumerate(grads, start=1):
        rho = 0.0 if c >= warmup else 0.99 * 0.5 * (1 + math.cos(math.pi * c / (warmup + 1)))
        if j % gap == 0:
            m = v = np.zeros_like(w)
        if theta != 0 and j >= accu and j % gap >= accu:
            spike = g * g > theta * v
            if not published:
                spike &= v > 0
            g = np.where(spike, np.sign(g) * np.sqrt(theta * v), g)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rate = lr * math.sqrt(1 - b2**j) / (1 - b1**j)
        w = w - (1 - rho) * rate * m / (np.sqrt(v) + eps)
        w = w - lr * wd * w
        c += 1
        if (j + 1) % gap == 0:
            c = 0
        out.append(w)
    return out


def stable_spam(
    w, grads, lr, g1, g2, g3, total, eta, gap, wd=0.0, published=True, eps=1e-8
):  # fmt: skip
    b1, b2 = 0.9, 0.999
    m = v = np.zeros_like(w)
    big = a = b = 0.0
    k, out = 0, []
    for j, g in enumerate(grads, start=1):
        position = j if published else min(j, (total or 0) + 1)
        sigma = 1.0
        if total is not None:
            sigma = eta + (1 - eta) * 0.5 * (1 + math.cos(math.pi * position / (total + 1)))
        first = b1 if g1 == -1 else g1
        w = w - lr * wd * w
        k += 1
        seen = k if published else j
        mu = np.abs(g).max()
        big = g3 * big + (1 - g3) * mu
        limit = big / (1 - g3**seen)
        g = np.where(np.abs(g) > limit, g / max(mu, 1e-300) * limit, g)
        nu = np.sqrt((g * g).sum())
        a = first * sigma * a + (1 - first * sigma) * nu
        b = g2 * b + (1 - g2) * nu * nu
        if nu > 0:
            hat_a, hat_b = a / (1 - (first * sigma) ** seen), b / (1 - g2**seen)
            g = g / nu * hat_a / (np.sqrt(hat_b) + eps)
        beta = b1 * sigma
        if gap and j % gap == 0:
            k = 1
            if not published:
                m = v = np.zeros_like(w)
        m = beta * m + (1 - beta) * g
        v = b2 * v + (1 - b2) * g * g
        w = w - lr / (1 - beta**k) * m / (np.sqrt(v) / math.sqrt(1 - b2**k) + eps)
        if gap and j % gap == 0 and published:
            m = v = np.zeros_like(w)
        out.append(w)
    return out


def scale(w, grads, lr, kind, momentum=0.9, wd=0.0):
    """Rows are outputs. An embedding is normalized per column, the head through its momentum."""
    m, out = np.zeros_like(w), []
    for g in grads:
        if kind == "head":
            m = momentum * m + (1 - momentum) * g
            g = m
        u = np.zeros_like(g)
        for i, j in np.ndindex(*g.shape):
            line = g[:, j] if kind == "embedding" else g[i]
            u[i, j] = g[i, j] / max(math.sqrt((line * line).mean()), 1e-8)
        w = (1 - lr * wd) * w - lr * u
        out.append(w)
    return out


def loro_product(b, a, grads, lr, hidden, every, refresh_every, wd=0.0):
    """B A after each update: Riemannian steps with explicit m x n matrices."""
    rank = b.shape[1]
    adams, out = (AdamH(), AdamH()), []
    for u, (gb, ga) in enumerate(grads):
        db, da = adams[0](gb), adams[1](ga)
        rate = adams[0].rate(lr)
        if (u + 1) % every == 0:
            qu, x = np.linalg.qr(b)
            qv, y = np.linalg.qr(a.T)
            p, q = db @ np.linalg.inv(y), np.linalg.inv(x).T @ da
            # tangent vector U Q V V' + (I - U U') P V' + U Q (I - V V')
            k0 = q @ qv
            tangent = qu @ k0 @ qv.T
            tangent = tangent + (p - qu @ (qu.T @ p)) @ qv.T
            tangent = tangent + qu @ (q - k0 @ qv.T)
            left, values, right = np.linalg.svd(b @ a - rate * tangent, full_matrices=False)
            root = np.sqrt(values[:rank])
            b, a = left[:, :rank] * root, root[:, None] * right[:rank]
        else:
            zeta = rank / hidden
            b, a = b - rate * zeta * db, a - rate * zeta * da
            b, a = b - rate * wd * b, a - rate * wd * a
        if (u + 1) % refresh_every == 0:
            adams = (AdamH(), AdamH())
        out.append((b, a))
    return out


def orthogonal(x):
    """Muon's quintic, five times, on the singular values of x / |x|."""
    left, values, right = np.linalg.svd(x / (np.sqrt((x * x).sum()) + 1e-7), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def muon(w, grads, lr, mu, wd=0.0, fraction=1.0, beta2=None):
    """Muon; with beta2 NorMuon; with a fraction below 1 Dion2 and NorDion2."""
    (rows, columns), out = w.shape, []
    stretch = math.sqrt(max(1.0, rows / columns))
    momentum, second = np.zeros_like(w), np.zeros(rows)
    for g in grads:
        chosen = np.ix_(range(rows), range(columns))
        if fraction == 1:
            momentum = mu * momentum + (1 - mu) * g
            x = momentum if beta2 is not None else (1 - mu) * g + mu * momentum
        else:
            momentum = momentum + g
            axis = 0 if beta2 is not None or rows <= columns else 1
            sums = np.abs(momentum).sum(axis=1 - axis)
            best = np.sort(np.argsort(-sums)[: math.ceil(fraction * len(sums))])
            chosen = np.ix_(best, range(columns)) if axis == 0 else np.ix_(range(rows), best)
            x = momentum[chosen].copy()
            momentum[chosen] *= mu
        o = orthogonal(x)
        if beta2 is not None:
            at = chosen[0][:, 0]
            second[at] = beta2 * second[at] + (1 - beta2) * (o * o).mean(axis=1)
            changed = o / (np.sqrt(second[at]) + 1e-8)[:, None]
            o = changed * np.sqrt((o * o).sum() / (changed * changed).sum())
        w = (1 - lr * wd) * w
        w[chosen] -= lr * stretch * o
        out.append(w.copy())
    return out


def spectron(b, a, grads, lr, mu, wd=0.0):
    """B and A after each update; singular values by the power iteration of the paper."""
    momenta = [np.zeros_like(b), np.zeros_like(a)]
    vectors, out = [None, None], []

    def norm_of(x, side):
        u = vectors[side]  # x has r rows
        rows = np.sqrt((x * x).sum(axis=1))
        if u is None or np.linalg.norm(x.T @ u) < rows.max():
            u = np.eye(len(x))[rows.argmax()]
        v = x.T @ u
        v = v / np.linalg.norm(v)
        s = np.linalg.norm(x @ v)
        vectors[side] = x @ v / s
        return s

    for gradients in grads:
        momenta = [mu * m + (1 - mu) * g for m, g in zip(momenta, gradients, strict=True)]
        rho = lr / (norm_of(b.T, 0) + norm_of(a, 1) + 1)
        b, a = (
            (1 - lr * wd) * w - rho * orthogonal(m) for w, m in zip((b, a), momenta, strict=True)
        )
        out.append((b, a))
    return out
