"""From settings to optimizers over a real decoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.config import optimizers as config
from megalr.config import projected
from megalr.config.methods import FullRankMethod, LowRankMethod, SLTrainMethod
from megalr.errors import UserError
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.optim import (
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
)
from megalr.optim.groups import parameter_groups
from megalr.optim.loro import exact_step
from megalr.optim.methods import RunFacts, kinds_apart, make_optimizer

SIZES = {"hidden_size": 32, "intermediate_size": 43, "num_layers": 2, "vocab_size": 60}
FACTS = RunFacts(total_updates=50, hidden_size=32, seed=7)
ADAMW = config.AdamWOptimizer(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
R = {"rank": 4, "update_proj_gap": 5}
METHODS = {
    GaLore: projected.GaLoreMethod(**R, state_bits=8),
    Fira: projected.FiraMethod(**R, compat="published"),
    Apollo: projected.ApolloMethod(**R),
    ApolloMini: projected.ApolloMiniMethod(update_proj_gap=5),
    GoLore: projected.GoLoreMethod(**R),
}
OPTIMIZERS = {
    SPAM: config.SPAMOptimizer(lr=0.01, density=0.5),
    StableSPAM: config.StableSPAMOptimizer(lr=0.01, weight_decay=0.2),
    Muon: config.MuonOptimizer(lr=0.01),
    NorMuon: config.NorMuonOptimizer(lr=0.01, fraction=0.5),
    SCALE: config.SCALEOptimizer(lr=0.01),
}


def decoder_and_groups(method=None, decay=0.1, apart=(), **sizes):
    sizes = decoder_config("llama_9m", {**SIZES, "pad_multiple": 16, **sizes})
    decoder = build_decoder(sizes, method or FullRankMethod(), 3)
    factors = [p for pair in decoder.factor_pairs() for p in (pair.a, pair.b)]
    return decoder, parameter_groups(decoder, factors, decay, apart=apart)


def train(decoder, optimizer, updates):
    losses = []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (4, 17), generator=generator)
    for _ in range(updates):
        optimizer.zero_grad()
        loss = decoder(ids[:, :-1], ids[:, 1:])
        loss = loss if loss.dim() == 0 else loss.sum() / ids[:, 1:].numel()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", list(METHODS))
def test_a_method_projects_the_target_matrices_and_nothing_else(kind):
    decoder, groups = decoder_and_groups()
    optimizer = make_optimizer(ADAMW, METHODS[kind], groups, FACTS)
    assert type(optimizer) is kind
    named = {group["name"]: group for group in optimizer.param_groups}
    assert named["targets"]["rank"] == METHODS[kind].rank
    assert named["matrices"]["rank"] is None and named["vectors"]["rank"] is None
    names = {id(p): name for name, p in decoder.named_parameters()}
    others = {names[id(p)].split(".")[0] for p in named["matrices"]["params"]}
    assert len(named["matrices"]["params"]) == 2 and len(others) == 2  # embedding and head
    assert named["targets"]["betas"] == (0.8, 0.9) and named["targets"]["eps"] == 1e-6
    assert named["targets"]["weight_decay"] == 0.1 and named["vectors"]["weight_decay"] == 0.0
    losses = train(decoder, optimizer, 12)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("weights", ["full_rank", "low_rank"])
def test_an_optimizer_trains_full_and_factorized_weights(kind, weights):
    method = FullRankMethod() if weights == "full_rank" else LowRankMethod(rank=4, alpha=8.0)
    decoder, groups = decoder_and_groups(method, apart=kinds_apart(OPTIMIZERS[kind]))
    optimizer = make_optimizer(OPTIMIZERS[kind], method, groups, FACTS)
    assert type(optimizer) is kind
    losses = train(decoder, optimizer, 12)
    assert losses[-1] < losses[0]
    if kind is StableSPAM:
        assert optimizer.param_groups[0]["total_T"] == 50


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [FullRankMethod(), SLTrainMethod(rank=4, density=0.1)])
def test_scale_knows_the_kind_of_every_parameter(method, tied):
    """A tied embedding is the output head; sparse values are no matrix and get Adam."""
    apart = kinds_apart(OPTIMIZERS[SCALE])
    decoder, groups = decoder_and_groups(method, apart=apart, tie_embeddings=tied)
    optimizer = make_optimizer(OPTIMIZERS[SCALE], method, groups, FACTS)
    kinds = {id(p): g["kind"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in decoder.named_parameters():
        first, last = name.split(".")[0], name.rpartition(".")[2]
        kind = "vectors" if last == "values" or parameter.dim() == 1 else "matrices"
        kind = {"embedding": "head" if tied else "embedding", "head": "head"}.get(first, kind)
        assert kinds[id(parameter)] == kind, name
    losses = train(decoder, optimizer, 12)
    assert losses[-1] < losses[0]


def test_plain_adamw_is_left_to_the_caller():
    _, groups = decoder_and_groups()
    assert make_optimizer(ADAMW, FullRankMethod(), groups, FACTS) is None


def test_padding_of_the_model_stays_zero_under_every_method():
    for method, optimizer in [*((m, ADAMW) for m in METHODS.values()),
                              *((FullRankMethod(), o) for o in OPTIMIZERS.values())]:  # fmt: skip
        decoder, groups = decoder_and_groups(apart=kinds_apart(optimizer))
        zero = {name: p == 0 for name, p in decoder.named_parameters()}
        assert sum(int(mask.sum()) for mask in zero.values()) > 500  # width 43 is stored as 48
        train(decoder, make_optimizer(optimizer, method, groups, FACTS), 7)
        for name, p in decoder.named_parameters():
            assert (p[zero[name]] == 0).all(), (type(method), name)


BAD = [
    (ADAMW, projected.GaLoreMethod(rank=33), "rank 33 is out of range for layers.0.attention.q"),
    (ADAMW, projected.FiraMethod(rank=4, targets=("q", "o")), "are stored together"),
    (OPTIMIZERS[SPAM], projected.FiraMethod(rank=4), "optimizer.name must be adamw, got spam"),
]


@pytest.mark.parametrize("optimizer,method,message", BAD)
def test_settings_that_cannot_work_are_refused(optimizer, method, message):
    _, groups = decoder_and_groups()
    with pytest.raises(UserError) as refused:
        make_optimizer(optimizer, method, groups, FACTS)
    assert message in str(refused.value)


def test_loro_takes_its_pairs_from_the_factors_of_the_model():
    decoder, groups = decoder_and_groups(LowRankMethod(rank=4, alpha=4.0))
    method = projected.LOROMethod(rank=4, exact_every=3)
    optimizer = make_optimizer(ADAMW, method, groups, FACTS)
    train(decoder, optimizer, 3)
    for pair in decoder.factor_pairs():
        b, a = pair.b[slice(*pair.b_rows)], pair.a[slice(*pair.a_rows)]
        assert torch.allclose(b.mT @ b, a @ a.mT, atol=1e-5)  # balanced by the exact step


def test_exact_loro_step_of_length_zero_keeps_the_product():
    b, a = torch.randn(9, 3).double(), torch.randn(3, 7).double()
    new_b, new_a = exact_step(b, a, torch.randn(9, 3).double(), torch.randn(3, 7).double(), 0.0)
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-12)


def test_a_pair_with_a_zero_direction_takes_the_plain_loro_step():
    b, a, d_b, d_a = (torch.randn(shape).double() for shape in ((9, 3), (3, 7), (9, 3), (3, 7)))
    b[:, 1] = 0.0
    for pair in ((b, a), (torch.randn(9, 3).double(), torch.where(a == a[2], 0.0, a))):
        new_b, new_a = exact_step(*pair, d_b, d_a, 0.1)
        assert torch.equal(new_b, pair[0] - 0.1 * d_b) and torch.equal(new_a, pair[1] - 0.1 * d_a)


def test_run_facts_ask_for_bf16_moments_only_when_the_run_does():
    _, groups = decoder_and_groups()
    facts = RunFacts(50, 32, 7, bf16_states=True)
    optimizer = make_optimizer(OPTIMIZERS[StableSPAM], SimpleNamespace(name="x"), groups, facts)
    assert optimizer.state_dtype is torch.bfloat16
