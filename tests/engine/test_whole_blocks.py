"""ZeRO 3 gathers a block in one message, compiled or not, and changes no number of the run."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.distributed.process_group import GLOO_REST_SECONDS
from megalr.engine.build import build_engine, set_learning_rate
from megalr.engine.config import resolve_deepspeed_config
from megalr.models.build import build_model
from megalr.restarts.controller import Restarts
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero
from tests.training.test_resume import _cut_back

UPDATES = 7
LOW_RANK = {"name": "low_rank", "rank": 8, "alpha": 16.0}
METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"method": LOW_RANK, "restarts": {"every": 3, "verify": True}},
    "sltrain": {"method": {"name": "sltrain", "rank": 8, "alpha": 16.0, "density": 0.1}},
    "full_rank": {"method": {"name": "full_rank"}},
    "lora": {"method": {"name": "lora", "rank": 8, "alpha": 16.0}},
}
EVERYTHING_CUT = {"stage3_param_persistence_threshold": 0}
CUT = zero(3, **EVERYTHING_CUT)
AT_ONCE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, **EVERYTHING_CUT}
"""Nothing stays gathered longer than its module works, and nothing is gathered before."""


def _values(method: str = "low_rank", recompute: str = "none", **train: Any) -> dict[str, Any]:
    """12 sequences an update in micro-batches of 2, with an epsilon above the noise of gradients
    that are nearly 0, so that weights can be compared."""
    unused = Path("unused")
    return settings(
        unused,
        unused,
        **METHODS[method],
        model={"num_layers": 3},
        optimizer={"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3},
        train={"activation_checkpointing": recompute, **train},
    )


def _compiled_by(backend: str) -> Any:
    """Let everything in this context compile with a backend that takes no C++ compiler."""
    return mock.patch.object(torch, "compile", partial(torch.compile, backend=backend))


def _engine(values: dict[str, Any], ds_user: dict[str, Any]) -> tuple[RunConfig, Any]:
    config = RunConfig.model_validate(values)
    ds_config = resolve_deepspeed_config(config, ds_user, "test", dist.get_world_size())
    return config, build_engine(config, ds_config, build_model(config, torch.device("cpu")))


def _micro_batches(engine: Any, update: int) -> list[torch.Tensor]:
    """This rank's of an update, ``(2, 25)`` each; together 12 sequences on any number of ranks."""
    ids = torch.randint(0, 120, (12, 25), generator=torch.Generator().manual_seed(update))
    mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
    return list(mine.chunk(engine.gradient_accumulation_steps()))


def _forward(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    """Summed over micro-batches and averaged over ranks, the mean loss of all 12 sequences."""
    scale = dist.get_world_size() / (12 * 24)
    return engine(ids[:, :-1], ids[:, 1:], None, scale=scale)


def _train(values: dict[str, Any], ds_user: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms by update; masters at the end; graphs compiled by update."""
    from deepspeed.utils import safe_get_full_fp32_param
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with _compiled_by("aot_eager_decomp_partition"):
        config, engine = _engine(values, ds_user)
    decoder = engine.module
    restarts = Restarts(config.restarts, engine, decoder.factor_pairs(), 100, lambda t: 1.0)
    losses, norms, graphs, restarted = [], [], [], []
    for update in range(UPDATES):
        set_learning_rate(engine, 0.01)
        total = torch.zeros(())
        for ids in _micro_batches(engine, update):
            loss = _forward(engine, ids)
            total += loss.detach() / dist.get_world_size()
            engine.backward(loss.clone(), scale_wrt_gas=False)
            engine.step()
        dist.all_reduce(total)
        losses.append(float(total))
        norms.append(float(engine.get_global_grad_norm()))
        graphs.append(counters["stats"]["unique_graphs"])
        report = restarts.after_update(update + 1)
        if report is not None and report.refactorized and report.reset and report.verified:
            restarted.append(update + 1)
    trained = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    weights = {name: safe_get_full_fp32_param(p) for name, p in trained.items()}
    breaks = dict(counters["graph_break"])
    engine.destroy()
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "graphs": graphs,
        "breaks": breaks,
        "restarts": restarted,
    }


def _distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


CASES = [
    (2, "low_rank", "none"),
    (3, "full_rank", "full"),
    (3, "low_rank", "full"),
    (2, "low_rank", "mlp"),
    (2, "low_rank", "bottleneck"),
    (3, "sltrain", "none"),
    (2, "sltrain", "elementwise"),
    (2, "lora", "none"),
]


@pytest.mark.parametrize(
    ("world_size", "method", "recompute"),
    [pytest.param(*case, marks=pytest.mark.long if case in CASES[1:] else ()) for case in CASES],
)
def test_compiled_zero_3_makes_the_updates_of_zero_1_and_of_zero_3_without_compilation(
    world_size: int, method: str, recompute: str
) -> None:
    found = run_distributed(_train, world_size, _values(method, recompute, compile=True), CUT)
    # Refactorization turns factors whose singular values lie close together by rounding, and Adam's
    # update of elements depends on that turn; without restarts there is nothing but rounding.
    bound, of_norms = (1e-4, 1e-4) if method == "low_rank" else (2e-6, 1e-5)
    for user, values in ((zero(1), _values(method)), (CUT, _values(method, recompute))):
        plain = run_distributed(_train, world_size, values, user)
        for rank, other in zip(found, plain, strict=True):
            assert rank["losses"] == pytest.approx(other["losses"], rel=1e-6)
            assert rank["norms"] == pytest.approx(other["norms"], rel=of_norms)
            assert _distance(rank["weights"], other["weights"]) < bound
            assert rank["restarts"] == other["restarts"]
            assert other["graphs"] == [0] * UPDATES
    rank = found[0]
    assert rank["restarts"] == ([3, 6] if method == "low_rank" else [])
    # The first block (whose second input has no gradient), the others, the norm, the loss: all are
    # compiled in the first update, and neither later updates nor restarts compile again.
    assert rank["graphs"] == [4] * UPDATES and not rank["breaks"]
    assert max(rank["losses"]) - min(rank["losses"]) > 1e-3


def _watched(values: dict[str, Any], ds_user: dict[str, Any]) -> dict[str, Any]:
    """What ZeRO 3 does in the last micro-batch of three updates.

    ``fetches``: for every module that gets its weights, in order: "forward" or "backward", its
    name, its parameters that were not there, the messages sent to gather weights. ``kept``: modules
    whose gathered weights still take memory after the forward pass. ``live``: the most elements of
    whole weights at any time.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from torch.multiprocessing.reductions import StorageWeakRef

    torch._dynamo.reset()
    with _compiled_by("aot_eager_decomp_partition"):
        _, engine = _engine(values, ds_user)
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    fetch, gather = coordinator.fetch_sub_module, dist.all_gather_into_tensor
    names = {id(module): name for name, module in engine.module.named_modules()}
    fetches: list[tuple[str, str, int, int]] = []
    storages: list[tuple[str, Any]] = []
    live, messages, kept = [0], Counter(), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        messages["gathers"] += 1
        return gather(*args, **kwargs)

    def away(parameters: Any) -> list[Any]:
        return [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]

    def watched(module: torch.nn.Module, forward: bool) -> None:
        block = names[id(module)].startswith("layers.")
        parameters = list(module.parameters(recurse=block))
        missing, before = len(away(parameters)), messages["gathers"]
        fetch(module, forward)
        sent = messages["gathers"] - before
        fetches.append(("forward" if forward else "backward", names[id(module)], missing, sent))
        every = list(engine.module.parameters())
        live.append(sum(p.ds_numel for p in every) - sum(p.ds_numel for p in away(every)))
        if forward:
            of = names[id(module)]
            storages.extend((of, StorageWeakRef(p.data.untyped_storage())) for p in parameters)

    coordinator.fetch_sub_module = watched
    with mock.patch.object(dist, "all_gather_into_tensor", counted):
        for ids in (ids for update in range(3) for ids in _micro_batches(engine, update)):
            fetches.clear()
            storages.clear()
            loss = _forward(engine, ids)
            time.sleep(GLOO_REST_SECONDS)  # gloo's threads hold what they gathered a moment longer
            kept = sorted({name for name, storage in storages if not storage.expired()})
            engine.backward(loss.clone(), scale_wrt_gas=False)
            engine.step()
    engine.destroy()
    return {"fetches": fetches, "kept": kept, "live": max(live)}


def _of_blocks(fetches: list[tuple[str, str, int, int]]) -> list[tuple[str, str, int, int]]:
    return [fetch for fetch in fetches if fetch[1].startswith("layers.")]


def test_a_block_is_gathered_by_one_message_in_either_direction() -> None:
    found = run_distributed(_watched, 2, _values(compile=True), zero(3, **AT_ONCE))[0]
    outer = ["", "embedding", "layers.0", "layers.1", "layers.2", "norm", "head"]
    names = [name for _, name, _, _ in found["fetches"]]
    # A block has two outputs, and the gradient of either asks for its weights.
    twice = ["layers.2", "layers.2", "layers.1", "layers.1", "layers.0", "layers.0"]
    assert names == [*outer, "", "head", "norm", *twice, "embedding"]
    assert sum(sent for *_, sent in found["fetches"]) == 2 * 6  # not the decoder itself
    for direction in ("forward", "backward"):
        counts = [(m, n) for way, _, m, n in _of_blocks(found["fetches"]) if way == direction]
        assert [count for count in counts if count != (0, 0)] == [(10, 1)] * 3
    # What a compiled block saves is the parameter, no view of its gathered weights; torch 2.6 keeps
    # the weights. Versions between were not tried.
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if not (2, 6) < version < (2, 11):
        kept = ["layers.0", "layers.1", "layers.2"] if version == (2, 6) else []
        assert found["kept"] == kept


def test_the_next_block_is_gathered_while_one_works() -> None:
    found = run_distributed(_watched, 2, _values("full_rank"), CUT)[0]
    assert [missing for _, _, missing, _ in found["fetches"]] == [0] * len(found["fetches"])
    numel = 48 * (48 + 2 * 24) + 48 * 48 + 3 * 48 * 96 + 2 * 48  # a block with its norms
    few = {"stage3_prefetch_bucket_size": numel // 4, "stage3_max_reuse_distance": 0}
    found = run_distributed(_watched, 2, _values("full_rank"), zero(3, **few, **EVERYTHING_CUT))[0]
    assert sum(missing for _, _, missing, _ in _of_blocks(found["fetches"])) > 0


def test_bounds_of_live_parameters_and_reuse_bound_what_is_gathered() -> None:
    """The memory estimate relies on this."""
    block, table = 20832, 128 * 48
    for live in (0, block, 2 * block):
        user = zero(3, stage3_max_live_parameters=live, **EVERYTHING_CUT)
        user["zero_optimization"]["stage3_max_reuse_distance"] = 0
        found = run_distributed(_watched, 2, _values("full_rank"), user)[0]
        assert found["live"] <= live + block + table


def test_blocks_that_are_not_compiled_keep_their_dense_weights() -> None:
    """``torch.nn.functional.linear`` saves a view of the weight for its backward pass."""
    user = zero(3, **AT_ONCE)
    found = run_distributed(_watched, 2, _values("full_rank"), user)[0]
    assert found["kept"] == ["layers.0", "layers.1", "layers.2"]
    found = run_distributed(_watched, 2, _values("full_rank", "full"), user)[0]
    assert found["kept"] == []


@pytest.mark.long
def test_a_compiled_run_of_zero_3_evaluates_restarts_and_goes_on_at_zero_1(
    data: Path, tmp_path: Path
) -> None:
    """A whole run by inductor: the losses of a run of ZeRO 1 that is not compiled."""
    sections: dict[str, Any] = {
        "restarts": {"every": 4, "verify": True},
        "checkpoint": {"every": 5},
        "optimizer": {"eps": 1e-3},  # as in _values
    }
    train = {"updates": 10}
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    run_distributed(run, 2, settings(plain, data, **sections, train=train), zero(1))
    values = settings(compiled, data, **sections, train={**train, "compile": True})
    run_distributed(run, 2, values, CUT)
    expected = losses(plain)
    assert losses(compiled) == pytest.approx(expected, abs=2e-5)
    evaluations = [
        {event["update"]: event["loss"] for event in events(folder, "eval")}
        for folder in (plain, compiled)
    ]
    assert evaluations[1] == pytest.approx(evaluations[0], abs=2e-5) and len(evaluations[0]) == 2
    _cut_back(compiled, 5)
    (compiled / "metrics.jsonl").unlink()
    run_distributed(run, 2, settings(compiled, data, **sections, train=train), zero(1))
    assert [event["update"] for event in events(compiled, "resume")] == [5]
    assert losses(compiled) == pytest.approx(expected[5:], abs=2e-5)
