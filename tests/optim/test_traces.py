"""The optimizers against traces of the published classes and against formulas written twice."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megalr.optim import (
    LORO,
    SCALE,
    SPAM,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GoLore,
    Muon,
    NorMuon,
    StableSPAM,
    projection,
)
from tests.optim import oracle

TRACES = json.loads((Path(__file__).parent / "data" / "optimizer_traces.json").read_text())


def run(make, w, grads):
    """Weights after each update of ``make([parameter])`` on float64 gradients."""
    parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer, out = make([parameter]), []
    for g in grads:
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
        out.append(parameter.detach().numpy().copy())
    return out


def closest(ours, reference):
    return max(np.abs(x - y).max() for x, y in zip(ours, reference, strict=True))


def trace_optimizer(kind, c):
    low_rank = {k: c[k] for k in ("lr", "rank", "update_proj_gap", "scale", "proj_type") if k in c}
    if kind == "adamw_torch":
        return lambda p: torch.optim.AdamW(
            p, lr=c["lr"], betas=c["betas"], eps=c["eps"], weight_decay=c["wd"]
        )
    if kind == "galore":
        return lambda p: GaLore(p, weight_decay=c["wd"], **low_rank)
    if kind == "fira":
        return lambda p: Fira(p, compat="published", **low_rank)
    if kind == "apollo":
        return lambda p: Apollo(p, compat="published", proj="svd", **low_rank)
    if kind == "spam":
        return lambda p: SPAM(
            p, lr=c["lr"], threshold=c["theta"], update_gap=c["gap"],
            warmup_epoch=c["warmup_epoch"], density=c["density"], compat="published",
        )  # fmt: skip
    return lambda p: StableSPAM(
        p, lr=c["lr"], weight_decay=c["wd"], gamma1=c["gamma1"], gamma2=c["gamma2"],
        gamma3=c["gamma3"], total_T=c["total_T"], eta=c["eta"], update_gap=c["gap"],
        compat="published",
    )  # fmt: skip


def trace_gradient(kind, t, m, n):
    g = oracle.gradient(t, m, n)
    if kind == "stable_spam" and (t + 1) % 3 == 0:
        return np.where(g > 0.9, 5 * g, g)
    if kind == "spam" and (t + 1) % 7 == 0:
        return np.where(g > 0.9, 401 * g, g)
    return g


@pytest.mark.parametrize("name", list(TRACES["cases"]))
def test_trace_of_the_published_class_is_reproduced_to_1e_12(name, monkeypatch):
    case, kind = TRACES["cases"][name], name.split()[0]
    m, n = map(int, name.split()[-1].split("x"))
    recorded = iter(
        torch.tensor(TRACES["projectors"][f"{m}x{n} update {t}"], dtype=torch.float64)
        if m != n and f"{m}x{n} update {t}" in TRACES["projectors"]
        else None
        for t in (0, 4, 8)
    )

    def bases(grad, rank):
        basis = next(recorded)
        true = oracle.singular_vectors(grad.numpy(), rank)[0 if m < n else 1]
        # the recorded basis holds the singular vectors up to sign and fp32 rounding
        assert np.abs(np.abs((true * basis.numpy()).sum(axis=0)) - 1).max() < 1e-6
        return basis, basis

    monkeypatch.setattr(projection, "svd_bases", bases)
    wanted = case["W_after_step"]
    last = max(map(int, wanted))
    weights = run(
        trace_optimizer(kind, case["config"]),
        oracle.weight(m, n),
        [trace_gradient(kind, t, m, n) for t in range(last)],
    )
    for step, w in wanted.items():
        assert np.abs(weights[int(step) - 1] - np.array(w)).max() < 1e-12


SHAPES = [(7, 5), (5, 7), (6, 6), (12, 3), (2, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_galore_follows_its_formula_for_every_side_and_shape(shape, proj_type):
    grads = oracle.gradients(11, *shape)
    for rank, gap, nl in itertools.product((1, 2), (1, 4, 5, 100), (False, True)):
        make = lambda p, r=rank, k=gap, nl=nl: GaLore(  # noqa: E731
            p, lr=0.02, rank=r, update_proj_gap=k, scale=0.5, proj_type=proj_type,
            weight_decay=0.3, limiter=nl,
        )  # fmt: skip
        w = oracle.weight(*shape)
        want = oracle.galore(w, grads, 0.02, rank, gap, 0.5, proj_type, wd=0.3, nl=nl)
        assert closest(run(make, w, grads), want) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_fira_follows_its_formula_with_and_without_the_published_residual(shape, compat, proj_type):
    grads = oracle.gradients(11, *shape)
    for rank, gap, nl in itertools.product((1, 2), (1, 4, 100), (False, True)):
        make = lambda p, r=rank, k=gap, nl=nl: Fira(  # noqa: E731
            p, lr=0.02, rank=r, update_proj_gap=k, scale=0.25, proj_type=proj_type,
            weight_decay=0.1, limiter=nl, compat=compat,
        )  # fmt: skip
        w = oracle.weight(*shape)
        want = oracle.fira(
            w, grads, 0.02, rank, gap, 0.25, proj_type, 0.1, nl, compat == "published"
        )
        assert closest(run(make, w, grads), want) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_follows_its_formula_and_chain_of_seeds(shape, proj, scale_type):
    grads = oracle.gradients(10, *shape, 0.4)  # no row is nearly orthogonal to the projections
    for rank, front, nl in itertools.product((1, 2), (False, True), (False, True)):
        make = lambda p, r=rank, f=front, nl=nl: Apollo(  # noqa: E731
            p, lr=0.02, rank=r, update_proj_gap=3, scale=7.0, scale_type=scale_type,
            scale_front=f, proj=proj, weight_decay=0.1, limiter=nl,
        )  # fmt: skip
        w = oracle.weight(*shape)
        want = oracle.apollo(w, grads, 0.02, rank, 3, 7.0, scale_type, front, proj, "std", 0.1, nl)
        assert closest(run(make, w, grads), want) < 1e-12


def test_apollo_mini_is_apollo_of_rank_one_with_one_scale():
    w, grads = oracle.weight(5, 7), oracle.gradients(8, 5, 7)
    ours = run(lambda p: ApolloMini(p, rank=1, update_proj_gap=4, lr=0.01), w, grads)
    want = oracle.apollo(w, grads, 0.01, 1, 4, 128.0, "tensor")
    assert closest(ours, want) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_golore_moves_as_the_factor_form_with_a_rotated_momentum(shape):
    w, grads = oracle.weight(*shape), oracle.gradients(12, *shape)
    side = "right" if shape[0] >= shape[1] else "left"

    def basis(u, d):
        seed = projection.mixed_seed(0, 1, u)
        found = projection.random_orthonormal_basis(torch.from_numpy(d), 2, side, seed).numpy()
        return found.T if side == "right" else found

    want = oracle.golore_factor_form(w, grads, 0.02, 2, 3, 12, 0.5, basis)
    ours = run(
        lambda p: GoLore(p, lr=0.02, rank=2, update_proj_gap=3, total_updates=12, rand_ratio=0.5),
        w,
        grads,
    )
    assert closest(ours, want) < 1e-12


@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize("gap,warmup", [(9, 3), (30, 10), (50, 0)])
def test_spam_follows_its_formula_around_resets_and_spikes(compat, gap, warmup):
    grads = [g * (300.0 if t % 7 == 6 else 1.0) for t, g in enumerate(oracle.gradients(70, 4, 6))]
    for g in grads[:40]:
        g[2] = 0.0  # a row that is first seen late: its v is zero until then
    w = oracle.weight(4, 6)
    ours = run(
        lambda p: SPAM(p, lr=0.01, threshold=40.0, update_gap=gap, warmup_epoch=warmup,
                       grad_accu_steps=5, weight_decay=0.05, compat=compat),
        w, grads,
    )  # fmt: skip
    want = oracle.spam(w, grads, 0.01, 40.0, gap, warmup, 5, 0.05, compat == "published")
    assert closest(ours, want) < 1e-12


@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize(
    "total,gap,gamma1", [(None, 7, 0.85), (10, 7, -1), (40, 0, 0.7), (9, 1, 0.5)]
)
def test_stable_spam_follows_its_formula_with_and_without_the_accidents(compat, total, gap, gamma1):
    grads = [g * (9.0 if t % 4 == 3 else 1.0) for t, g in enumerate(oracle.gradients(30, 4, 5))]
    grads[12] = np.zeros((4, 5))
    w = oracle.weight(4, 5)
    ours = run(
        lambda p: StableSPAM(p, lr=0.01, weight_decay=0.1, gamma1=gamma1, gamma2=0.99, gamma3=0.9,
                             total_T=total, eta=0.4, update_gap=gap, compat=compat),
        w, grads,
    )  # fmt: skip
    want = oracle.stable_spam(
        w, grads, 0.01, gamma1, 0.99, 0.9, total, 0.4, gap, 0.1, compat == "published"
    )
    assert closest(ours, want) < 1e-12


@pytest.mark.parametrize("kind", ["matrices", "embedding", "head", None])
@pytest.mark.parametrize("shape", [(7, 5), (1, 6), (6, 1)])
def test_scale_divides_rows_or_columns_by_their_rms(kind, shape):
    grads = [g * 30.0 ** (t % 3) for t, g in enumerate(oracle.gradients(8, *shape))]
    grads[5][-1] = 0.0  # an output without gradient
    w = oracle.weight(*shape)
    ours = run(lambda p: SCALE(p, lr=0.02, kind=kind, momentum=0.7, weight_decay=0.3), w, grads)
    assert closest(ours, oracle.scale(w, grads, 0.02, kind, 0.7, 0.3)) < 1e-12


def test_scale_gives_vectors_adam_with_epsilon_outside_the_correction():
    w, grads = oracle.weight(1, 9)[0], [g[0] for g in oracle.gradients(6, 1, 9)]
    ours = run(lambda p: SCALE(p, lr=0.03, eps=1e-6), w, grads)
    assert closest(ours, oracle.adam_h(w, grads, 0.03)) < 1e-12
    table = oracle.weight(4, 9)
    grads = oracle.gradients(6, 4, 9)
    ours = run(lambda p: SCALE(p, lr=0.03, eps=1e-6, kind="vectors"), table, grads)
    assert closest(ours, oracle.adam_h(table, grads, 0.03)) < 1e-12


@pytest.mark.parametrize("shape", [(9, 6), (5, 8), (6, 6)])
def test_loro_moves_the_product_as_the_riemannian_step_does(shape):
    m, n, r = *shape, 2
    b0, a0 = oracle.weight(m, r), oracle.weight(r, n)
    grads = [(oracle.gradient(t, m, r), oracle.gradient(t, r, n, 0.5)) for t in range(9)]
    b, a = (torch.nn.Parameter(torch.from_numpy(x.copy())) for x in (b0, a0))
    b.row_blocks, a.row_blocks = (("w.B", 0, m),), (("w.A", 0, r),)
    optimizer = LORO([b, a], lr=0.01, hidden_size=8, exact_every=4, weight_decay=0.1)
    wanted = oracle.loro_product(b0, a0, grads, 0.01, 8, 4, 4, wd=0.1)
    for (gb, ga), (wb, wa) in zip(grads[:4], wanted, strict=False):
        b.grad, a.grad = torch.from_numpy(gb.copy()), torch.from_numpy(ga.copy())
        optimizer.step()
        assert np.abs((b @ a).detach().numpy() - wb @ wa).max() < 1e-12
    balance = (b.mT @ b - a @ a.mT).abs().max()  # the retraction returns balanced factors
    assert balance < 1e-12
    assert all(int(optimizer.state[p]["exp_avg"].abs().sum()) == 0 for p in (b, a))


def test_groups_without_a_rank_get_adam_with_epsilon_outside_the_correction():
    w, grads = oracle.weight(4, 3), oracle.gradients(6, 4, 3)
    ours = run(lambda p: GaLore(p, lr=0.03, weight_decay=0.2), w, grads)
    assert closest(ours, oracle.adam_h(w, grads, 0.03, 0.2)) < 1e-12


ORTHOGONAL = {
    "muon": (Muon, {}, {}),
    "dion2": (Muon, {"fraction": 0.3}, {"fraction": 0.3}),
    "normuon": (NorMuon, {"muon_beta2": 0.8}, {"beta2": 0.8}),
    "nordion2": (
        NorMuon, {"muon_beta2": 0.8, "fraction": 0.3}, {"beta2": 0.8, "fraction": 0.3}
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("name", list(ORTHOGONAL))
@pytest.mark.parametrize("method", ["gram", "standard"])
def test_orthogonalized_momentum_is_the_rule_in_float64(shape, name, method, monkeypatch):
    kind, options, of_oracle = ORTHOGONAL[name]
    w, grads = oracle.weight(*shape), oracle.gradients(7, *shape)

    def ours():
        return run(
            lambda p: kind(
                p,
                lr=0.01,
                use_muon=True,
                momentum=0.9,
                weight_decay=0.5,
                ns_method=method,
                **options,
            ),
            w,
            grads,
        )

    wanted = oracle.muon(w.copy(), grads, 0.01, 0.9, wd=0.5, **of_oracle)
    if method == "gram":
        assert closest(ours(), wanted) < 1e-3  # the iteration in fp16
        monkeypatch.setattr("megalr.optim.muon._gram_dtype", lambda device: torch.float64)
        assert closest(ours(), wanted) < 1e-12
    else:
        assert closest(ours(), wanted) < 3e-3  # in bf16


def test_muon_gives_other_groups_the_adamw_of_torch():
    w, grads = oracle.weight(4, 3), oracle.gradients(6, 4, 3)
    ours = run(
        lambda p: Muon(p, lr=0.1, adam_lr_ratio=0.1, weight_decay=0.2, betas=(0.9, 0.95)), w, grads
    )
    adamw = run(
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2),
        w,
        grads,
    )
    assert closest(ours, adamw) < 1e-12
