"""Facts about the engine that the loop relies on, checked on the live engine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.engine.build import build_engine, set_learning_rate
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import UserError
from megalr.models.build import build_model
from tests.ranks import run_distributed
from tests.training.runs import settings, zero


def _weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole weight in float32, also where ZeRO-3 has cut it."""
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(parameter, "ds_id"):
        return safe_get_full_fp32_param(parameter)
    return parameter.detach().float()


def _counters_and_weights(values: dict, stage: int) -> tuple[list[float], float, list[str]]:
    """Adam's counters after two updates; how far the first moved weights; names of the groups."""
    config = RunConfig.model_validate(values)
    ds_config = resolve_deepspeed_config(config, zero(stage), "test", 1)
    decoder = build_model(config, torch.device("cpu"))
    before = [p.detach().to(torch.bfloat16) for p in decoder.parameters()]
    engine = build_engine(config, ds_config, decoder)
    untouched = all(
        torch.equal(_weight(p).to(torch.bfloat16), old)
        for p, old in zip(decoder.parameters(), before, strict=True)
    )
    ids = torch.arange(48).reshape(2, 24)
    moved = []
    for _ in range(12):
        set_learning_rate(engine, 0.5)
        loss = engine(ids, ids.roll(-1, 1), scale=1.0 / ids.numel())
        engine.backward(loss.clone(), scale_wrt_gas=False)
        engine.step()
        moved.append(_weight(decoder.layers[0].mlp_norm.weight).mean().item())
    counters = [float(state["step"]) for state in engine.basic_optimizer.state.values()]
    names = [group["name"] for group in engine.optimizer.param_groups]
    engine.destroy()
    assert untouched
    return counters, moved[5], names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_update_is_adams_first_and_initialization_changes_no_weight(
    precision: str, stage: int, tmp_path: Path
) -> None:
    options = {"precision": precision, "gradient_clipping": 0.0}
    values = settings(tmp_path, tmp_path, train=options)  # 6 micro-batches an update
    ((counters, moved, names),) = run_distributed(_counters_and_weights, 1, values, stage)
    assert set(counters) == {2.0}
    # Adam's first step is the learning rate times the sign of the gradient: norms start at 1.
    assert abs(moved - 1.0) > 1e-3 and abs(moved - 1.0) <= 0.5 + 1e-2
    assert names == ["factors", "matrices", "vectors"]


def test_a_cuda_graph_without_cuda_is_refused(tmp_path: Path) -> None:
    config = RunConfig.model_validate(settings(tmp_path, tmp_path, train={"cuda_graphs": True}))
    decoder = build_model(config, torch.device("cpu"))
    ds_config = resolve_deepspeed_config(config, zero(1), "test", 1)
    with pytest.raises(UserError, match="cuda_graphs is true but there is no CUDA device"):
        build_engine(config, ds_config, decoder)


def _printed(values: dict, options: dict, fails: bool) -> str:
    """What building an engine prints, also if DeepSpeed fails at the end of that."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    def end(self: object) -> None:
        raise RuntimeError("for the test")

    config = RunConfig.model_validate(values)
    ds_config = resolve_deepspeed_config(config, zero(1) | options, "test", 1)
    decoder = build_model(config, torch.device("cpu"))
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        if fails:
            stack.enter_context(patch.object(BF16_Optimizer, "_setup_for_real_optimizer", end))
            stack.enter_context(pytest.raises(RuntimeError, match="for the test"))
        build_engine(config, ds_config, decoder).destroy()
    return printed.getvalue()


def test_what_deepspeed_prints_while_it_builds_is_shown_on_failure_or_request(
    tmp_path: Path,
) -> None:
    values = settings(tmp_path, tmp_path, train={"precision": "bf16"})
    assert run_distributed(_printed, 1, values, {}, False) == [""]
    for options, fails in (({}, True), ({"log_level": "info"}, False)):
        (printed,) = run_distributed(_printed, 1, values, options, fails)
        assert "begin bf16_optimizer" in printed
