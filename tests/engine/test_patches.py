"""Batched work on gradients gives what DeepSpeed's own code gives, parameter by parameter."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalr.config.schema import RunConfig
from megalr.data.loader import UpdateBatch
from megalr.engine import build as engines
from megalr.engine.config import resolve_deepspeed_config
from megalr.engine.patches import batch_parameters
from megalr.engine.state import EngineState
from megalr.models.build import build_model
from megalr.training.step import train_step
from tests.ranks import run_distributed
from tests.training.runs import settings, zero

SIZES = {"hidden_size": 16, "intermediate_size": 27, "num_layers": 2, "vocab_size": 60}
UPDATES, BAD, CLIPPED = 5, 3, 5
"""Of the updates 1 to 5, 3 has a nan in the gradient of the last rank and 5 is clipped."""
KINDS = [("bf16", 1), ("bf16", 2), ("paper_bf16", 1), ("fp32", 1)]
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def _train(
    values: dict[str, Any], stage: int, batched: bool, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Weights, masters and moments after every update, and norms; with DeepSpeed's code or ours."""
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    config = RunConfig.model_validate(values)
    # Buckets that hold several parameters, and an embedding that is larger than a bucket.
    ds_user = zero(stage, reduce_bucket_size=900, **(options or {}))
    ds_config = resolve_deepspeed_config(config, ds_user, "test", dist.get_world_size())
    ours = batch_parameters if batched else lambda engine: None
    quick = patch.object(bf16_optimizer, "see_memory_usage")  # it collects garbage, 3 s an engine
    with patch.object(engines, "batch_parameters", ours), quick:
        engine = engines.build_engine(config, ds_config, build_model(config, torch.device("cpu")))
    names = {"update_hp_grads", "scaled_global_norm", "_get_norm_groups"}
    assert bool(names & vars(engine.optimizer).keys()) == batched
    parameters = list(engine.module.parameters())
    state = EngineState(engine)
    seen: dict[str, Any] = {"weights": [], "masters": [], "moments": [], "norms": [], "steps": []}
    factor = [1.0]  # of the first parameter's gradient
    parameters[0].register_hook(lambda gradient: gradient * factor[0])
    gradients = []
    step = engine.optimizer.step
    trained = [p for p in parameters if p.requires_grad]

    def look_and_step() -> None:
        gradients.append([deepspeed.utils.safe_get_full_grad(p).clone() for p in trained])
        step()

    engine.optimizer.step = look_and_step
    for number in range(1, UPDATES + 1):
        engine.optimizer.clip_grad = 0.01 if number == CLIPPED else 1e6
        last = dist.get_rank() == dist.get_world_size() - 1
        factor[0] = float("nan") if last and number == BAD else 1.0
        batch = _batch(number, engine.gradient_accumulation_steps())
        with _Waits() as waits:
            made = train_step(engine, batch, number, 0.01)
        seen["waits"], seen["operators"] = waits.count, waits.operators
        seen["norms"].append(float(made.norm))
        seen["steps"].append(made.applied)
        seen["weights"].append([_weights(p) for p in parameters])
        masters = [state.master(p) for p in state.parameters()]
        seen["masters"].append([m.clone() for m in masters if m is not None])
        moments = [state.states(p) for p in state.parameters()]
        seen["moments"].append([m.clone() for views in moments for m in views.values()])
    seen["gradients"] = gradients
    engine.destroy()
    return seen


def _weights(parameter: Any) -> torch.Tensor:
    """Of a parameter that is divided, this rank's share without padding, which is never written."""
    share = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter.detach().clone()
    rest = parameter.ds_numel - dist.get_rank() * share.numel()
    return share[: max(0, rest)].clone()


class _Waits(TorchDispatchMode):
    """Counts the values that the host reads from tensors; each waits for a GPU if there is one.

    ``operators``: all operators that Python starts.
    """

    count = operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _batch(number: int, micro_batches: int) -> UpdateBatch:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(100 * number + rank)
    ids = torch.randint(3, 60, (micro_batches, 2, 9), generator=generator)
    targets = 16 * micro_batches * world
    return UpdateBatch(number, [(i[:, :-1], i[:, 1:]) for i in ids], targets, (1,))


def _compare(cases: dict[tuple[str, int, int], dict[str, Any]]) -> None:
    """Compared on each rank, which has its own masters; the tensors would be many to send."""
    for case, values in cases.items():
        _assert_same(case, _train(values, case[1], True), _train(values, case[1], False))


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_updates_are_those_of_deepspeeds_own_code(world: int, tmp_path: Path) -> None:
    cases = {
        (precision, stage, accumulation): _values(tmp_path, precision, accumulation, world)
        for precision, stage in KINDS
        for accumulation in (1, 2)
        if precision != "fp32" or accumulation == 1
    }
    run_distributed(_compare, world, cases)


def _compare_offloaded(cases: dict[int, dict[str, Any]]) -> list[tuple[int, int, int]]:
    """(micro-batches, how often the host waits in an update with our code, with DeepSpeed's)."""
    waits = []
    for accumulation, values in cases.items():
        ours, theirs = (_train(values, 2, batched, OFFLOAD) for batched in (True, False))
        _assert_same(("bf16", 2, accumulation), ours, theirs)
        waits.append((accumulation, ours["waits"], theirs["waits"]))
    return waits


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 3])
def test_offloaded_updates_are_those_of_deepspeeds_own_code(world: int, tmp_path: Path) -> None:
    cases = {n: _values(tmp_path, "bf16", n, world) for n in (1, 2)}
    for waits in run_distributed(_compare_offloaded, world, cases):
        for _, ours, theirs in waits:
            assert ours <= 12 and theirs >= ours + 10


def _values(
    folder: Path, precision: str, accumulation: int, world: int, **sections: Any
) -> dict[str, Any]:
    sizes = {"global_batch_size": 2 * accumulation * world, "micro_batch_size": 2}
    train = {**sizes, "precision": precision, **sections.pop("train", {})}
    data, model = {"sequence_length": 8}, {**SIZES, **sections.pop("model", {})}
    return settings(folder, folder, model=model, train=train, data=data, **sections)


ZERO_3: dict[str, dict[str, Any]] = {
    "bf16": {},
    "paper_bf16": {
        "train": {"activation_checkpointing": "full"},
        "model": {"tie_embeddings": True},
    },
    "fp32": {"method": {"name": "lora", "rank": 4, "alpha": 8.0}},
}
"""Precisions, with recomputed blocks and one table for both ends, and with frozen weights."""


def _compare_zero_3(cases: dict[tuple[str, int, int], dict[str, Any]]) -> list[tuple[int, int]]:
    """(operators of an update with our code, with DeepSpeed's)."""
    # Norms stay whole on all ranks.
    options = {"stage3_param_persistence_threshold": 16, "stage3_max_reuse_distance": 0}
    operators = []
    for case, values in cases.items():
        ours, theirs = (_train(values, 3, batched, options) for batched in (True, False))
        _assert_same(case, ours, theirs)
        operators.append((ours["operators"], theirs["operators"]))
    return operators


def _replaced_at_zero_3(values: dict[str, Any]) -> list[set[str]]:
    """Of two methods, those replaced without and with unusual options."""
    config, found = RunConfig.model_validate(values), []
    for options in ({}, OFFLOAD, {"stage3_allgather_sequential": True}, {"reduce_scatter": False}):
        ds_config = resolve_deepspeed_config(config, zero(3, **options), "test", 2)
        engine = engines.build_engine(config, ds_config, build_model(config, torch.device("cpu")))
        coordinator = engine.optimizer.parameter_offload.param_coordinator
        on_both = vars(engine.optimizer).keys() | vars(coordinator).keys()
        found.append({"_get_norm_groups", "fetch_sub_module"} & on_both)
        engine.destroy()
    return found


def test_zero_3_with_options_that_are_not_known_keeps_deepspeeds_code(tmp_path: Path) -> None:
    found = run_distributed(_replaced_at_zero_3, 2, _values(tmp_path, "bf16", 1, 2))
    assert found == [[{"_get_norm_groups", "fetch_sub_module"}, set(), set(), set()]] * 2


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.long)])
def test_updates_of_zero_3_are_those_of_deepspeeds_own_code(world: int, tmp_path: Path) -> None:
    """On three ranks some shares are padded and others are not."""
    cases = {
        (precision, 3, accumulation): _values(tmp_path, precision, accumulation, world, **sections)
        for precision, sections in ZERO_3.items()
        for accumulation in (1, 2)
        if precision == "bf16" or accumulation == 2
    }
    for operators in run_distributed(_compare_zero_3, world, cases):
        assert all(ours < theirs - 300 for ours, theirs in operators)


def _assert_same(case: tuple[str, int, int], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["steps"] == theirs["steps"] == [n != BAD for n in range(1, UPDATES + 1)], case
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5), case
    assert ours["norms"][BAD - 1] == float("inf"), case
    for kind in ("weights", "masters", "moments"):
        for number, (mine, wanted) in enumerate(zip(ours[kind], theirs[kind], strict=True), 1):
            assert len(mine) == len(wanted) > 0, (case, kind, number)
            if number < CLIPPED:
                assert all(map(torch.equal, mine, wanted)), (case, kind, number)
                continue
            # The factor follows the norm, which is rounded in another order.
            rtol = 1e-5 if mine[0].dtype == torch.float32 else 2**-7
            torch.testing.assert_close(mine, wanted, rtol=rtol, atol=1e-9)
    for number, (mine, wanted) in enumerate(
        zip(ours["gradients"], theirs["gradients"], strict=True), 1
    ):
        if number != BAD:
            assert all(map(torch.equal, mine, wanted)), (case, "gradients", number)
            squares = sum(float(g.double().square().sum()) for g in mine)
            assert ours["norms"][number - 1] == pytest.approx(squares**0.5, rel=1e-5), case
    # Clipping was at work in the last update.
    assert ours["norms"][CLIPPED - 1] > 0.02


def test_sums_of_an_update_hold_nothing_of_the_one_before(tmp_path: Path) -> None:
    """A parameter without gradient has a sum of zero, whatever the last update left there."""
    values = _values(tmp_path, "bf16", 2, 1)
    (sums,) = run_distributed(_sums_after_two_updates, 1, values)
    for ours, theirs, used in sums:
        assert ours == pytest.approx(theirs) and any(theirs) == used


def _sums_after_two_updates(values: dict[str, Any]) -> list[tuple[list[float], list[float], bool]]:
    """Of each parameter: sums with our code and DeepSpeed's, and whether the last update used it.

    Every parameter has gradients in the first update, every second one in the other.
    """
    config = RunConfig.model_validate(values)
    ds_config = resolve_deepspeed_config(config, zero(1), "test", 1)
    found: list[list[list[float]]] = []
    for ours in (batch_parameters, lambda engine: None):
        with patch.object(engines, "batch_parameters", ours):
            engine = engines.build_engine(
                config, ds_config, build_model(config, torch.device("cpu"))
            )
        optimizer = engine.optimizer
        parameters = [p for group in optimizer.bf16_groups for p in group]
        for update in range(2):
            for micro in (1.0, 2.0):
                for index, parameter in enumerate(parameters):
                    used = update == 0 or index % 2 == 0
                    parameter.grad = torch.full_like(parameter, micro) if used else None
                optimizer.update_hp_grads()
            if update == 0:
                optimizer.zero_grad()
        sums = [total for group in optimizer.fp32_groups_gradients for total in group]
        found.append([total.flatten().tolist() for total in sums])
        engine.destroy()
    mine, theirs = found
    return [(a, b, i % 2 == 0) for i, (a, b) in enumerate(zip(mine, theirs, strict=True))]


def test_another_version_of_a_wrapper_keeps_its_own_code() -> None:
    replaced = [set(), {"check_overflow"}, set(), set()]
    assert run_distributed(_replaced_in_unknown_wrappers, 1) == [replaced]


def _replaced_in_unknown_wrappers() -> list[set[str]]:
    """Names of the methods put on wrappers that have none of the attributes of DeepSpeed 0.19.8."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    bf16 = BF16_Optimizer.__new__(BF16_Optimizer)
    zero_2 = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    zero_2.cpu_offload = False
    zero_3 = DeepSpeedZeroOptimizer_Stage3.__new__(DeepSpeedZeroOptimizer_Stage3)
    plain = torch.optim.SGD([torch.zeros(1)])
    replaced = []
    for wrapper in (bf16, zero_2, zero_3, plain):
        before = set(vars(wrapper))
        batch_parameters(SimpleNamespace(optimizer=wrapper))
        replaced.append(set(vars(wrapper)) - before)
    return replaced


def test_another_version_of_deepspeed_keeps_its_own_code() -> None:
    assert run_distributed(_replaced_in_another_version, 1) == [(set(), True)]


def _replaced_in_another_version() -> tuple[set[str], bool]:
    """Attributes set on a wrapper under another version of DeepSpeed; whether it was said."""
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    wrapper = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    wrapper.cpu_offload = False
    before = set(vars(wrapper))
    output = io.StringIO()
    with (
        patch.object(deepspeed, "__version__", "0.20.0"),
        contextlib.redirect_stdout(output),
    ):
        batch_parameters(SimpleNamespace(optimizer=wrapper))
    return set(vars(wrapper)) - before, "note: DeepSpeed 0.20.0 is not 0.19.8" in output.getvalue()
