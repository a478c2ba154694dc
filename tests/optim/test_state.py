"""State of the optimizers: what it holds, what it costs, how it is saved, reset and refused."""

from __future__ import annotations

import io

import pytest
import torch

from megalr.errors import UserError
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
    Spectron,
    StableSPAM,
    projection,
)
from megalr.optim.projection import refresh_due, subspace_basis, svd_bases

R = {"rank": 2, "update_proj_gap": 3}
MAKERS = {
    "spam": lambda p, **k: SPAM(p, update_gap=4, warmup_epoch=2, grad_accu_steps=1, **k),
    "spam_sparse": lambda p, **k: SPAM(p, update_gap=4, warmup_epoch=2, density=0.4, **k),
    "stable_spam": lambda p, **k: StableSPAM(p, update_gap=4, total_T=20, **k),
    "scale": lambda p, **k: SCALE(p, **k),
    "scale_embedding": lambda p, **k: SCALE(p, kind="embedding", **k),
    "scale_head": lambda p, **k: SCALE(p, kind="head", **k),
    "galore": lambda p, **k: GaLore(p, **R, **k),
    "galore_full": lambda p, **k: GaLore(p, proj_type="full", **R, **k),
    "fira": lambda p, **k: Fira(p, **R, **k),
    "apollo": lambda p, **k: Apollo(p, **R, **k),
    "apollo_mini": lambda p, **k: ApolloMini(p, rank=1, update_proj_gap=3, **k),
    "golore": lambda p, **k: GoLore(p, total_updates=8, rand_ratio=0.5, **R, **k),
    "muon": lambda p, **k: Muon(p, use_muon=True, **k),
    "dion2": lambda p, **k: Muon(p, use_muon=True, fraction=0.4, **k),
    "normuon": lambda p, **k: NorMuon(p, use_muon=True, **k),
    "nordion2": lambda p, **k: NorMuon(p, use_muon=True, fraction=0.4, **k),
    "spectron": lambda p, **k: Spectron(p, use_spectron=True, **k),
    "loro": lambda p, **k: LORO(p, hidden_size=8, exact_every=3, **k),
}
PAIRS = ("loro", "spectron")
"""Rules for a factor B and its A."""


def parameters(name, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(7, 5), (4, 9)]
    if name in PAIRS:
        shapes = [(7, 2), (2, 5)]
    tensors = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    if name in PAIRS:
        tensors[0].row_blocks, tensors[1].row_blocks = (("w.B", 0, 7),), (("w.A", 0, 2),)
    return tensors


def train(optimizer, tensors, updates, first=0):
    for t in range(first, first + updates):
        for i, p in enumerate(tensors):
            generator = torch.Generator().manual_seed(100 * t + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", list(MAKERS))
def test_state_survives_a_weights_only_file_and_continues_bitwise(name):
    tensors = parameters(name)
    optimizer = MAKERS[name](tensors)
    train(optimizer, tensors, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    weights = [p.detach().clone() for p in tensors]
    train(optimizer, tensors, 5, first=4)
    again = parameters(name)
    for p, w in zip(again, weights, strict=True):
        p.data.copy_(w)
    resumed = MAKERS[name](again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, again, 5, first=4)
    assert all(torch.equal(p, q) for p, q in zip(tensors, again, strict=True))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    return []


def test_state_sizes_are_those_of_the_memory_table():
    def elements(name, shape=(12, 5), **options):
        tensors = [torch.nn.Parameter(torch.randn(shape))]
        optimizer = MAKERS[name](tensors, **options)
        train(optimizer, tensors, 4)
        return sum(t.numel() for t in tensors_in(dict(optimizer.state[tensors[0]])))

    long, short, r = 12, 5, 2
    for shape in ((12, 5), (5, 12)):
        assert elements("galore", shape) == short * r + 2 * long * r
        assert elements("fira", shape) == short * r + 2 * long * r + 1
        assert elements("golore", shape) == short * r + 2 * long * r
        assert elements("apollo", shape) == 2 * long * r + 1  # the projector is only a seed
        assert elements("apollo_mini", shape) == 2 * long + 1
        assert elements("spam", shape) == 2 * 60
        assert elements("stable_spam", shape) == 2 * 60 + 3
        assert elements("muon", shape) == elements("dion2", shape) == 60
        assert elements("normuon", shape) == elements("nordion2", shape) == 60 + shape[0]
        assert elements("scale", shape) == elements("scale_embedding", shape) == 0
        assert elements("scale_head", shape) == 60


def test_sparse_spam_keeps_moments_of_the_mask_only_and_leaves_other_weights_alone():
    tensors = [torch.nn.Parameter(torch.randn(10, 10))]
    optimizer = SPAM(tensors, update_gap=6, density=0.3, warmup_epoch=1)
    before = tensors[0].detach().clone()
    train(optimizer, tensors, 4)
    state = optimizer.state[tensors[0]]
    assert int(state["mask"].sum()) == state["exp_avg"].numel() == 30
    moved = (tensors[0].detach() != before).flatten()
    assert torch.equal(moved, state["mask"])
    old_mask = state["mask"].clone()
    old = torch.zeros(100).masked_scatter_(old_mask, state["exp_avg"])
    train(optimizer, tensors, 1, first=4)  # draws the next mask
    grad = tensors[0].grad.flatten()
    new = torch.zeros(100).masked_scatter_(state["mask"], state["exp_avg"])
    both = old_mask & state["mask"]
    assert torch.allclose(new[both], 0.9 * old[both] + 0.1 * grad[both])
    assert int((new != 0).sum()) == int(both.sum()) and not torch.equal(old_mask, state["mask"])


@pytest.mark.parametrize(
    "name",
    ["galore", "fira", "apollo", "golore", "stable_spam", "normuon", "scale", "scale_embedding"],
)
def test_matrices_stacked_in_one_parameter_are_updated_as_separate_parameters(name):
    torch.manual_seed(1)
    shapes = [(6, 5), (3, 5), (8, 5)]  # right, left and right projections
    rows = [(0, 6), (6, 9), (9, 17)]
    apart = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    stacked = torch.nn.Parameter(torch.cat([p.detach() for p in apart]))
    stacked.row_blocks = tuple((f"m{i}", *r) for i, r in enumerate(rows))
    one, two = MAKERS[name](apart), MAKERS[name]([stacked])
    for t in range(7):
        g = torch.randn(17, 5, generator=torch.Generator().manual_seed(t))
        stacked.grad = g.clone()
        for p, (a, b) in zip(apart, rows, strict=True):
            p.grad = g[a:b].clone()
        one.step()
        two.step()
    # Matrices of equal shape go through one batched product, which may round differently.
    assert torch.allclose(stacked, torch.cat(apart), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MAKERS if n not in PAIRS])
def test_padded_rows_and_columns_stay_exactly_zero(name):
    tensors = parameters(name)
    for p in tensors:
        p.data[-2:] = 0
        p.data[:, -1:] = 0
    optimizer = MAKERS[name](tensors)
    for t in range(9):
        for i, p in enumerate(tensors):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
            g[:, 1] = g[:, 0]  # rank-deficient: singular vectors of the null space are arbitrary
            g[-2:] = 0
            g[:, -1:] = 0
            p.grad = g
        optimizer.step()
    assert all(p[-2:].abs().sum() == 0 and p[:, -1:].abs().sum() == 0 for p in tensors)


@pytest.mark.parametrize("name", PAIRS)
def test_padding_of_factors_stays_zero(name):
    tensors = parameters(name)
    b, a = tensors
    optimizer = MAKERS[name](tensors)
    for p, index in ((b, (slice(-2, None), slice(None))), (a, (slice(None), slice(-1, None)))):
        p.data[index] = 0
    for _ in range(6):
        b.grad, a.grad = torch.randn(7, 2), torch.randn(2, 5)
        b.grad[-2:], a.grad[:, -1:] = 0, 0
        optimizer.step()
    assert b[-2:].abs().sum() == 0 and a[:, -1:].abs().sum() == 0 and b.abs().sum() > 0


def test_subspace_iteration_finds_the_leading_singular_subspace():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 200))
    v, _ = torch.linalg.qr(torch.randn(200, 200))
    flat = torch.linspace(1.0, 0.3, 200)  # no gap anywhere: the hard case
    for values in (flat, 0.95 ** torch.arange(200)):
        g = u * values @ v.T
        for side, matrix in (("right", g), ("left", g.T.contiguous())):
            exact = svd_bases(g, 40)[1]
            cold = subspace_basis(matrix, 40, side, None, 0)
            warm = subspace_basis(matrix, 40, side, cold, 1)
            for basis, captured in ((cold, 0.96), (warm, 0.98)):
                assert torch.allclose(basis.mT @ basis, torch.eye(40), atol=1e-5)
                ratio = (g @ basis).square().sum() / (g @ exact).square().sum()
                assert captured < ratio < 1 + 1e-6
            assert ((cold * warm).sum(dim=0) > 0).all()  # moments keep their directions
    g = u * 0.8 ** torch.arange(200) @ v.T  # a decaying spectrum: the vectors themselves
    basis, exact = subspace_basis(g, 20, "right", None, 0), svd_bases(g, 20)[1]
    assert ((basis * exact).sum(dim=0).abs() > 1 - 1e-4).all()


def test_auto_takes_the_full_svd_where_the_iteration_would_not_pay(monkeypatch):
    called = []
    monkeypatch.setattr(
        projection, "svd_bases", lambda g, r: called.append(r) or (g.new_zeros(1), g.new_zeros(1))
    )
    monkeypatch.setattr(
        projection, "subspace_basis", lambda g, r, side, start, seed: g.new_zeros(g.shape[1], r)
    )
    for shape, rank, svd in (
        ((300, 128), 8, True), ((300, 129), 8, False), ((129, 300), 96, False),
        ((200, 160), 120, False), ((200, 160), 121, True),
    ):  # fmt: skip
        called.clear()
        projection.leading_bases(torch.randn(shape), rank, "right")
        assert bool(called) == svd


def test_subspace_iteration_survives_a_gradient_of_lower_rank_than_the_projection():
    torch.manual_seed(0)
    for exact_rank, g in (
        (0, torch.zeros(200, 160)),
        (3, torch.randn(200, 3) @ torch.randn(3, 160)),
        (1, torch.eye(200, 160) * (torch.arange(200) == 5)[:, None]),
    ):
        for start in (None, torch.linalg.qr(torch.randn(160, 20)).Q):
            basis = subspace_basis(g, 20, "right", start, 0)
            assert basis.isfinite().all()
            assert torch.allclose(basis.mT @ basis, torch.eye(20), atol=1e-4)
            assert exact_rank == 0 or torch.allclose(g @ basis @ basis.mT, g, atol=1e-4)


def test_refreshes_are_staggered_evenly_over_the_period():
    counts = [sum(refresh_due(t, 50, n, True) for n in range(1, 101)) for t in range(50)]
    assert sum(counts) == 100 and max(counts) <= 4
    assert [t for t in range(12) if refresh_due(t, 5, 3, False)] == [0, 5, 10]


def test_a_zero_gradient_at_the_first_update_only_delays_the_projector():
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = Fira([p], rank=2, update_proj_gap=100)
    p.grad = torch.zeros(6, 4)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.randn(6, 4)
    optimizer.step()
    assert (p.detach() - before).abs().min() > 0


@pytest.mark.parametrize("name", ["galore", "spam", "stable_spam"])
def test_moments_are_fp32_for_bf16_parameters_unless_bf16_is_asked_for(name):
    for asked, got in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        tensors = parameters(name, torch.bfloat16)
        optimizer = MAKERS[name](tensors, state_dtype=asked)
        train(optimizer, tensors, 3)
        state = optimizer.state[tensors[0]]
        store = next(iter(state["matrices"].values())) if "matrices" in state else state
        assert store["exp_avg"].dtype == store["exp_avg_sq"].dtype == got
        if name == "stable_spam":
            assert state["max_average"].dtype == torch.float32


def test_bf16_second_moments_never_decrease_and_fp32_ones_do():
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.zeros(64))
        optimizer = SPAM([p], update_gap=0, threshold=0, state_dtype=dtype)
        for t in range(600):
            p.grad = torch.full((64,), 1.0 if t < 300 else 0.1)
            optimizer.step()
            if t == 299:
                peak = optimizer.state[p]["exp_avg_sq"].float().clone()
        ends[dtype] = (optimizer.state[p]["exp_avg_sq"].float() / peak).max()
    assert ends[torch.float32] < 0.8 and ends[torch.bfloat16] == 1.0


@pytest.mark.parametrize("name", ["galore", "spam", "loro"])
def test_reset_zeroes_the_chosen_moments_and_reports_how_much(name):
    tensors = parameters(name)
    optimizer = MAKERS[name](tensors)
    assert optimizer.reset_moments() == (0, 0)
    train(optimizer, tensors, 2)
    zeroed, held = optimizer.reset_moments(tensors[:1], ["exp_avg"], "one")
    state = optimizer.state[tensors[0]]
    store = next(iter(state["matrices"].values())) if "matrices" in state else state
    assert store["exp_avg"].abs().sum() == 0 and store["exp_avg_sq"].abs().sum() > 0
    assert zeroed == store["exp_avg"].numel() and state["step"] == 1
    assert optimizer.state[tensors[1]]["step"] == 2
    assert optimizer.reset_moments(counter="zero") == (held, held)
    assert optimizer.state[tensors[1]]["step"] == 0


def test_a_reset_zeroes_the_momentum_that_scale_has():
    head, matrix, vector = (torch.nn.Parameter(torch.randn(s)) for s in ((5, 4), (3, 4), (6,)))
    optimizer = SCALE([{"params": [head], "kind": "head"}, {"params": [matrix, vector]}])
    train(optimizer, [head, matrix, vector], 3)
    assert optimizer.reset_moments([matrix]) == (0, 20 + 2 * 6)
    assert optimizer.state[head]["momentum_buffer"].any()
    assert optimizer.reset_moments([head], counter="zero") == (20, 32)
    assert optimizer.reset_moments(moments=["exp_avg_sq"]) == (6, 32)
    assert not optimizer.state[head]["momentum_buffer"].any()
    assert optimizer.state[vector]["exp_avg"].any() and optimizer.state[vector]["step"] == 3


def test_scale_in_bfloat16_rounds_once():
    weight, grad = torch.randn(9, 33).bfloat16(), torch.randn(9, 33).bfloat16()
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    SCALE([parameter], lr=0.1, state_dtype=torch.bfloat16).step()
    exact = grad.double() / grad.double().square().mean(dim=1, keepdim=True).sqrt()
    want = (weight.double() - 0.1 * exact).bfloat16()
    assert torch.equal(parameter.detach(), want)


BAD = [
    (lambda p: GaLore(p, rank=6), "rank 6 is out of range for tensor1 of shape (7, 5)"),
    (lambda p: GaLore(p, rank=0), "rank 0 is out of range"),
    (lambda p: GaLore(p, rank=2, update_proj_gap=0), "update_proj_gap must be >= 1 update, got 0"),
    (lambda p: GaLore(p, rank=2, proj_type="up"), "proj_type must be one of std"),
    (lambda p: GaLore(p, rank=2, basis="qr"), "basis must be one of auto"),
    (lambda p: Fira(p, rank=2, proj_type="full"), "proj_type cannot be full"),
    (lambda p: Fira(p, rank=2, compat="old"), "compat must be one of none, published"),
    (lambda p: Apollo(p, rank=2, scale_type="row"), "scale_type must be one of channel, tensor"),
    (lambda p: GoLore(p, rank=2, total_updates=9, rand_ratio=-1), "rand_ratio must be in [0, 1]"),
    (lambda p: SPAM(p, density=0.0), "density must be in (0, 1], got 0.0"),
    (lambda p: StableSPAM(p, gamma2=1.0), "gamma2 must be in [0, 1), got 1.0"),
    (lambda p: StableSPAM(p, total_T=0), "total_T must be >= 1 update"),
    (lambda p: SCALE(p, kind="rows"), "kind must be one of matrices, embedding, head, vectors"),
    (lambda p: SCALE(p, momentum=1.0), "momentum must be in [0, 1), got 1.0"),
    (lambda p: LORO(p, hidden_size=8, exact_every=0), "exact_every must be >= 1 update, got 0"),
    (lambda p: GaLore(p, lr=-1), "optimizer.lr must be >= 0, got -1"),
    (lambda p: GaLore(p, betas=(0.9, 1.0)), "optimizer.betas must be two numbers in [0, 1)"),
    (lambda p: GaLore(p, lr=float("nan")), "optimizer.lr must be >= 0, got nan"),
    (lambda p: GaLore(p, rank=2, state_bits=16), "method.state_bits must be one of 8, 32, got 16"),
    (lambda p: Apollo(p, rank=2, scale=0.0), "method.scale must be > 0, got 0.0"),
    (lambda p: GoLore(p, rank=2), "total_updates must be >= 1, got None"),
    (lambda p: StableSPAM(p, gamma1=-0.5), "optimizer.gamma1 must be in [0, 1), or -1, got -0.5"),
    (lambda p: LORO(p, hidden_size=8, lr_scaler=0.0), "lr_scaler must be above 0, or -1, got 0.0"),
    (lambda p: SPAM(p, update_gap=1.5), "optimizer.update_gap must be a valid integer"),
    (lambda p: SPAM(p, density=2.0, eps=-1), "optimizer.eps must be > 0, got -1; optimizer.dens"),
    (lambda p: Muon(p, fraction=0.0), "optimizer.fraction must be in (0, 1], got 0.0"),
    (lambda p: NorMuon(p, muon_beta2=1.0), "optimizer.muon_beta2 must be in [0, 1), got 1.0"),
    (lambda p: SPAM([{"params": p, "threshold": -1}]), "optimizer.threshold must be >= 0, got -1"),
]


@pytest.mark.parametrize("make,message", BAD)
def test_options_without_a_meaning_are_refused_with_the_value_seen(make, message):
    with pytest.raises(UserError) as refused:
        make([torch.nn.Parameter(torch.randn(7, 5))])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_misspelt_option_is_an_error_of_the_caller():
    with pytest.raises(TypeError, match="unknown options: rnk; known: lr, betas"):
        GaLore([torch.nn.Parameter(torch.randn(7, 5))], rnk=2)


def test_a_vector_in_a_projected_group_is_refused():
    with pytest.raises(UserError, match="is no matrix"):
        GaLore([torch.nn.Parameter(torch.randn(7))], rank=2)


@pytest.mark.parametrize("name", ["galore", "apollo", "golore"])
@pytest.mark.parametrize("stagger", [False, True])
def test_projectors_do_not_notice_that_a_reset_restarts_adams_counter(name, stagger):
    """Resets every 4 updates, refreshes every 6, GoLore random from update 12 of 24 on."""
    make = {"galore": GaLore, "apollo": Apollo, "golore": GoLore}[name]
    extra = {"total_updates": 24, "rand_ratio": 0.5} if name == "golore" else {}
    key = "seed" if name == "apollo" else "projector"
    found = {}
    for counter in ("keep", "one", "zero"):
        tensors = parameters(name) + parameters(name)
        optimizer = make(tensors, rank=2, update_proj_gap=6, stagger=stagger, **extra)
        found[counter] = []
        for t in range(24):
            train(optimizer, tensors, 1, t)
            states = [own for p in tensors for _, own in optimizer.tensor_states(p)]
            found[counter].append([torch.as_tensor(own[key]).clone() for own in states])
            if (t + 1) % 4 == 0:
                optimizer.reset_moments(counter=counter)
    for i in range(4):
        history = [now[i] for now in found["zero"]]
        due = [t for t in range(1, 24) if refresh_due(t, 6, i + 1, stagger)]
        changed = [t for t in range(1, 24) if not torch.equal(history[t], history[t - 1])]
        assert changed == due
        for other in ("keep", "one"):
            assert all(torch.equal(a, b[i]) for a, b in zip(history, found[other], strict=True))


@pytest.mark.parametrize("make", [GaLore, Fira, Apollo, ApolloMini])
def test_after_a_reset_of_the_counter_the_rule_is_that_of_a_new_optimizer(make):
    """The norm that the limiter remembers must not outlive the counter it belongs to."""
    options = {"rank": 1 if make is ApolloMini else 2, "limiter": True, "update_proj_gap": 100}
    tensors = parameters(make.__name__)
    optimizer = make(tensors, **options)
    train(optimizer, tensors, 30)
    optimizer.reset_moments(counter="zero")
    copies = [torch.nn.Parameter(p.detach().clone()) for p in tensors]
    train(optimizer, tensors, 5)  # the first gradient again, so that singular vectors are the same
    train(make(copies, **options), copies, 5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
