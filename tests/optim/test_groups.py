"""Learning rates and weight decays by kind of parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.config import load_run_config
from megalr.config import optimizers as config
from megalr.config.methods import FullRankMethod, LowRankMethod, SLTrainMethod
from megalr.config.optimizers import LearningRateRatios, WeightDecayRatios
from megalr.engine.build import set_learning_rate
from megalr.errors import UserError
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.optim.groups import parameter_groups
from megalr.optim.methods import RunFacts, build_optimizer, kinds_apart
from tests.optim.test_methods import METHODS, OPTIMIZERS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "vocab_size": 64}
FACTS = RunFacts(total_updates=50, hidden_size=32, seed=7)
RATIOS = {"embedding": 4.0, "head": 0.5, "norms": 2.0, "factors": 3.0, "sparse": 0.25,
          "matrices": 1.5}  # fmt: skip


def decoder_of(method: Any, **sizes: Any) -> Any:
    sizes = decoder_config("llama_9m", {**SIZES, "pad_multiple": 16, **sizes})
    return build_decoder(sizes, method, 3)


def kind_of(name: str, parameter: torch.Tensor) -> str:
    """The kind by the names that stand in a checkpoint."""
    last = name.rpartition(".")[2]
    if name.startswith(("embedding", "head")):
        return name.partition(".")[0]
    if last == "values":
        return "sparse"
    return "factors" if last in ("a", "b") else "norms" if parameter.dim() == 1 else "matrices"


CASES = [
    *((FullRankMethod(), optimizer) for optimizer in OPTIMIZERS.values()),
    *((method, config.AdamWOptimizer(lr=0.01)) for method in METHODS.values()),
    (FullRankMethod(), config.AdamWOptimizer(lr=0.01)),
    (LowRankMethod(rank=4, targets=("q", "k", "v", "o")), config.AdamWOptimizer(lr=0.01)),
    (SLTrainMethod(rank=4, density=0.1), config.SPAMOptimizer(lr=0.01, density=0.5)),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_parameter_gets_the_rate_and_the_decay_of_its_kind(case: int) -> None:
    method, optimizer = CASES[case]
    decoder = decoder_of(method)
    kinds = {id(p): kind_of(n, p) for n, p in decoder.named_parameters() if p.requires_grad}
    present = {kind: RATIOS[kind] for kind in set(kinds.values())}
    groups = parameter_groups(
        decoder,
        decoder.factor_parameters(),
        0.1,
        LearningRateRatios(**present),
        WeightDecayRatios(**{kind: 2 * ratio for kind, ratio in present.items()}),
        kinds_apart(optimizer),
    )
    made = build_optimizer(optimizer, method, groups, FACTS)
    set_learning_rate(SimpleNamespace(optimizer=made), 0.02)
    seen = []
    for group in made.param_groups:
        for parameter in group["params"]:
            seen.append(id(parameter))
            ratio = RATIOS[kinds[id(parameter)]]
            assert group["lr"] == 0.02 * ratio
            assert group["weight_decay"] == pytest.approx(0.1 * 2 * ratio)
    assert sorted(seen) == sorted(kinds)
    apart = kinds_apart(optimizer)
    groups = parameter_groups(decoder, decoder.factor_parameters(), 0.1, apart=apart)
    plain = build_optimizer(optimizer, method, groups, FACTS)
    marks = ("rank", "density", "use_muon", "kind")
    options = [
        {id(p): [g.get(mark) for mark in marks] for g in each.param_groups for p in g["params"]}
        for each in (made, plain)
    ]
    assert options[0] == options[1]  # the same rule for each parameter


def test_ratios_of_one_leave_the_groups_as_they_were() -> None:
    decoder = decoder_of(LowRankMethod(rank=4, targets=("q", "k", "v", "o")))
    groups = parameter_groups(decoder, decoder.factor_parameters(), 0.1)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("factors", 0.1),
        ("matrices", 0.1),
        ("vectors", 0.0),
    ]
    assert not any("lr_ratio" in g for g in groups)


def test_updates_are_those_of_separate_optimizers_with_these_rates() -> None:
    decoder, other = (decoder_of(FullRankMethod()) for _ in range(2))
    ratios = LearningRateRatios(embedding=4.0, matrices=0.5)
    groups = parameter_groups(decoder, [], 0.1, ratios)
    made = build_optimizer(config.AdamWOptimizer(lr=0.01), FullRankMethod(), groups, FACTS)
    rate = {"embedding": 0.04, "matrices": 0.005}
    separate = [
        torch.optim.AdamW(
            [p],
            lr=rate.get(kind_of(n, p), 0.01),
            weight_decay=0.0 if kind_of(n, p) == "norms" else 0.1,
        )
        for n, p in other.named_parameters()
    ]
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        set_learning_rate(SimpleNamespace(optimizer=made), 0.01)
        for model, optimizers in ((decoder, [made]), (other, separate)):
            model.zero_grad()
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(decoder.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_ratio_of_a_kind_that_the_model_has_not_is_an_error() -> None:
    tied = decoder_of(FullRankMethod(), tie_embeddings=True)
    for decoder, kind in ((decoder_of(FullRankMethod()), "factors"), (tied, "head")):
        with pytest.raises(UserError, match=rf"lr_ratio\.{kind} = 2\.0: the model has no"):
            parameter_groups(decoder, [], 0.1, LearningRateRatios(**{kind: 2.0}))
    with pytest.raises(UserError, match=r"weight_decay_ratio\.sparse = 0\.0"):
        parameter_groups(tied, [], 0.1, None, WeightDecayRatios(sparse=0.0))


RUN = [
    "run.dir=x", "model.preset=llama_60m", "data.train=d", "optimizer.lr=1e-3",
    "train={updates: 3, global_batch_size: 8, micro_batch_size: 8}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr_ratio.embeding=2", "lr_ratio.embeding = 2: unknown key"),
        ("optimizer.lr_ratio.head=0", "lr_ratio.head = 0: must be greater than 0"),
        ("optimizer.lr_ratio=2", "must be a section with keys of its own"),
        ("optimizer.weight_decay_ratio.head=0", "has no effect: optimizer.weight_decay is 0"),
    ],
)
def test_ratios_that_cannot_be_meant_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config([], [*RUN, override])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    ratios = load_run_config([], [*RUN, "optimizer.lr_ratio.head=3"]).optimizer.lr_ratio
    assert ratios == LearningRateRatios(head=3.0)
