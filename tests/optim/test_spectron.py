"""Spectron against its formulas in float64, its bound, and the factors that it starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import megalr
from megalr.config import load_run_config
from megalr.config.methods import LowRankMethod
from megalr.config.optimizers import SpectronOptimizer
from megalr.errors import UserError
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.optim import Spectron
from megalr.optim.groups import parameter_groups
from megalr.optim.methods import RunFacts, make_optimizer
from megalr.optim.spectron import power_step
from tests.optim import oracle

LARGEST = 1.203  # of the singular values that the iteration makes
SHAPES = [(9, 3, 7), (6, 4, 12), (5, 5, 5)]


@pytest.fixture
def exact(monkeypatch):
    """Newton-Schulz in float64."""
    monkeypatch.setattr("megalr.optim.muon._gram_dtype", lambda device: torch.float64)


def pair(m, r, n):
    """Parameters B and A with float64 elements."""
    b = torch.nn.Parameter(torch.from_numpy(oracle.weight(m, r) + 0.3 * np.eye(m, r)))
    a = torch.nn.Parameter(torch.from_numpy(oracle.weight(r, n) - 0.5 * np.eye(r, n)))
    b.row_blocks, a.row_blocks = (("w.B", 0, m),), (("w.A", 0, r),)
    return b, a


def gradients(m, r, n, updates):
    both = zip(oracle.gradients(updates, m, r), oracle.gradients(updates, r, n, 1.0), strict=True)
    return list(both)


def train(optimizer, b, a, grads):
    for gb, ga in grads:
        b.grad, a.grad = torch.from_numpy(gb.copy()), torch.from_numpy(ga.copy())
        optimizer.step()
        yield b.detach().numpy().copy(), a.detach().numpy().copy()


@pytest.mark.parametrize("shape", SHAPES)
def test_both_factors_move_as_in_the_paper_s_algorithm(shape, exact):
    b, a = pair(*shape)
    grads = gradients(*shape, 8)
    wanted = oracle.spectron(b.detach().numpy(), a.detach().numpy(), grads, 0.02, 0.9, wd=0.5)
    optimizer = Spectron([b, a], lr=0.02, momentum=0.9, weight_decay=0.5, use_spectron=True)
    for ours, theirs in zip(train(optimizer, b, a, grads), wanted, strict=True):
        assert max(np.abs(x - y).max() for x, y in zip(ours, theirs, strict=True)) < 1e-12


@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_changes_by_no_more_than_the_learning_rate(shape, lr, exact):
    """Times the largest singular value of the iteration; 3 % for a power iteration on its way."""
    b, a = pair(*shape)
    before, changes = b.detach().numpy() @ a.detach().numpy(), []
    optimizer = Spectron([b, a], lr=lr, use_spectron=True)
    for new_b, new_a in train(optimizer, b, a, gradients(*shape, 30)):
        changes.append(np.linalg.norm(new_b @ new_a - before, 2) / lr)
        before = new_b @ new_a
    assert max(changes) < 1.03 * LARGEST
    assert min(changes) > 0.05


def test_with_polar_factors_the_bound_is_the_learning_rate_itself(monkeypatch):
    def polar(matrices, method):
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        return left @ right

    monkeypatch.setattr("megalr.optim.spectron.orthogonalized", polar)
    monkeypatch.setattr(
        "megalr.optim.spectron.power_step",
        lambda x, u, ranks: (torch.linalg.matrix_norm(x, ord=2), u),
    )
    for shape in SHAPES:
        b, a = pair(*shape)
        before = b.detach().numpy() @ a.detach().numpy()
        optimizer = Spectron([b, a], lr=0.3, use_spectron=True)
        for new_b, new_a in train(optimizer, b, a, gradients(*shape, 10)):
            assert np.linalg.norm(new_b @ new_a - before, 2) <= 0.3
            before = new_b @ new_a


def test_the_power_iteration_finds_norms_and_notices_another_matrix():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 20, dtype=torch.float64)
    true = torch.linalg.matrix_norm(x, ord=2)
    u = x.new_zeros(4, 6)
    found = []
    for _ in range(60):
        norm, u = power_step(x, u)
        found.append(norm)
    assert all((norm <= true * (1 + 1e-12)).all() for norm in found)
    assert torch.allclose(found[-1], true, rtol=1e-6)
    assert (found[0] >= torch.linalg.vector_norm(x, dim=2).amax(dim=1)).all()
    # The same spectrum in another basis, as refactorization leaves it: orthogonal rows.
    _, values, right = torch.linalg.svd(x, full_matrices=False)
    turned = values[:, :, None] * right
    orthogonal_to_all = torch.zeros(4, 6, dtype=torch.float64)
    orthogonal_to_all[:, -1] = 1.0
    assert torch.allclose(power_step(turned, orthogonal_to_all)[0], true, rtol=1e-12)
    norm, u = power_step(torch.zeros(1, 6, 20), torch.ones(1, 6))
    assert norm == 0 and not u.any()


def decoder_with(method):
    sizes = {"hidden_size": 32, "intermediate_size": 43, "num_layers": 2, "vocab_size": 60}
    return build_decoder(decoder_config("llama_9m", {**sizes, "pad_multiple": 16}), method, 3)


def test_orthogonal_factors_have_singular_values_one_and_padding_stays_zero():
    decoder = decoder_with(LowRankMethod(rank=4, alpha=4.0, init="orthogonal"))
    for p in decoder.factor_pairs():
        b, a = p.b[slice(*p.b_rows)], p.a[slice(*p.a_rows)]
        assert torch.allclose(b.mT @ b, torch.eye(4), atol=1e-5)
        assert torch.allclose(a @ a.mT, torch.eye(4), atol=1e-5)
    factors = decoder.factor_parameters()
    groups = parameter_groups(decoder, factors, 0.1)
    settings = SpectronOptimizer(lr=0.05)
    facts = RunFacts(total_updates=50, hidden_size=32, seed=7)
    optimizer = make_optimizer(settings, LowRankMethod(rank=4, alpha=4.0), groups, facts)
    assert type(optimizer) is Spectron
    marked = [g for g in optimizer.param_groups if g["use_spectron"]]
    assert {id(p) for g in marked for p in g["params"]} == {id(p) for p in factors}
    zero = {name: p == 0 for name, p in decoder.named_parameters()}
    ids = torch.randint(0, 60, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = decoder(ids[:, :-1], ids[:, 1:])
        loss = loss if loss.dim() == 0 else loss.sum() / ids[:, 1:].numel()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all((p[zero[name]] == 0).all() for name, p in decoder.named_parameters())


def test_a_momentum_reset_zeroes_the_momentum_and_keeps_the_vectors():
    b, a = pair(9, 3, 7)
    optimizer = Spectron([b, a], lr=0.02, use_spectron=True)
    list(train(optimizer, b, a, gradients(9, 3, 7, 3)))
    assert optimizer.reset_moments() == (27 + 21, 27 + 21)
    assert not optimizer.state[b]["momentum_buffer"].any()
    own = optimizer.state[b]["matrices"]["w.B"]
    assert own["power_b"].shape == own["power_a"].shape == (3,) and own["power_a"].any()


def test_what_has_no_pairs_is_refused():
    b, a = pair(9, 3, 7)
    with pytest.raises(UserError, match=r"found w\.B without w\.A in the same"):
        Spectron([{"params": [b]}, {"params": [a]}], use_spectron=True)
    with pytest.raises(UserError, match="Spectron found no factors in groups with use_spectron"):
        Spectron([b, a])
    dense = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(UserError, match=r"tensor3 of shape \(4, 4\) is none"):
        Spectron([b, a, dense], use_spectron=True)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["method.rank=8", "method.alpha=16"], "method.alpha.*alpha / rank = 16 / 8.*alpha=8"),
        (["method.name=cola", "method.rank=8"], "method cola has other matrices, use low_rank"),
        (["method.name=full_rank"], "method full_rank has other matrices, use low_rank"),
    ],
)
def test_settings_without_a_bound_are_refused(overrides, message):
    base = ["run.dir=x", "model.preset=llama_9m", "data.train=x", "train.updates=10"]
    base += ["train.global_batch_size=8", "train.micro_batch_size=8", "data.sequence_length=64"]
    base += ["optimizer.name=spectron", "optimizer.lr=0.01"]
    if not any(o.startswith("method.name") for o in overrides):
        base.append("method.name=low_rank")
    with pytest.raises(UserError, match=message):
        load_run_config([], [*base, *overrides])


def test_the_library_s_factors_can_start_orthogonal():
    layer = megalr.factorize_(torch.nn.Sequential(torch.nn.Linear(12, 9)), rank=3, alpha=3.0,
                              targets=["0"], init="orthogonal")[0]  # fmt: skip
    assert torch.allclose(layer.b.mT @ layer.b, torch.eye(3), atol=1e-5)
