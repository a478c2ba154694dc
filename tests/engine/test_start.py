"""At ZeRO 3 a model is drawn and shared out piece by piece, to the weights of one drawn whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.engine.config import resolve_deepspeed_config
from megalr.estimate.memory import estimate_memory
from tests.live_bytes import LiveBytes
from tests.ranks import run_distributed
from tests.training.runs import settings, zero
from tests.training.test_methods import METHODS

CASES: dict[str, dict[str, Any]] = {
    "full_rank": {"method": {"name": "full_rank"}},
    "low_rank": {},
    **{name: METHODS[name] for name in ("sltrain", "lora")},
}


def _start(values: dict[str, Any], in_pieces: bool) -> tuple[dict[str, torch.Tensor], float, int]:
    """Whole weights of an engine at ZeRO 3, its first loss, most bytes alive till they are set."""
    from deepspeed import zero as deepspeed_zero

    from megalr.engine import build
    from megalr.hf.init_from_pretrained import initial_model
    from megalr.models.build import build_model
    from megalr.tensor_parallel.mesh import make_mesh

    config = RunConfig.model_validate(values)
    mesh, device = make_mesh(1, "cpu"), torch.device("cpu")
    ds_config = resolve_deepspeed_config(config, zero(3), "test", mesh.data_size)
    live, share_out = LiveBytes(), build._share_out

    def counted(*arguments: Any) -> None:
        with live:
            share_out(*arguments)

    with live:
        if in_pieces:
            decoder, _, fill = initial_model(config, device, mesh, None, empty=True)
        else:
            decoder, fill = build_model(config, device, mesh), None
    with mock.patch.object(build, "_share_out", counted):
        engine = build.build_engine(config, ds_config, decoder, fill)
    with deepspeed_zero.GatheredParameters(list(decoder.parameters())):
        weights = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    ids = torch.arange(48).reshape(2, 24)
    loss = float(engine(ids, ids.roll(-1, 1), scale=0.01))
    engine.destroy()
    return weights, loss, live.peak


def _start_both(cases: list[dict[str, Any]]) -> list[list[tuple]]:
    return [[_start(values, in_pieces) for in_pieces in (False, True)] for values in cases]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple]]:
    folder = tmp_path_factory.mktemp("start")
    return dict(zip(CASES, run_distributed(_start_both, 2, _values(folder))[0], strict=True))


def _values(folder: Path) -> list[dict[str, Any]]:
    train = {"precision": "bf16"}
    model = {"num_layers": 6, "hidden_size": 64}
    return [settings(folder, folder, train=train, model=model, **case) for case in CASES.values()]


@pytest.mark.parametrize("name", CASES)
def test_weights_and_losses_are_those_of_a_model_drawn_whole(
    name: str, started: dict[str, list[tuple]]
) -> None:
    (whole, whole_loss, _), (pieces, loss, _) = started[name]
    assert pieces.keys() == whole.keys()
    for key, tensor in whole.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(pieces[key], tensor), key
    assert loss == whole_loss


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_never_whole_on_a_rank(
    name: str, started: dict[str, list[tuple]], tmp_path: Path
) -> None:
    """The estimate's start is the memory that is alive, and less than a model drawn whole needs."""
    (_, _, whole), (_, _, pieces) = started[name]
    config = RunConfig.model_validate(_values(tmp_path)[list(CASES).index(name)])
    states = estimate_memory(config, zero(3), "x", 2).states
    estimate = states.weights + states.frozen + states.start
    # SLTrain's int64 indices are on the host, which here is the device.
    host = 2 * states.frozen if name == "sltrain" else 0
    assert 0.8 * estimate < pieces <= estimate + host
    assert pieces < 0.85 * whole


def _start_before_deepspeed_knows_the_ranks(values: dict[str, Any]) -> list[tuple]:
    """As in a program: nothing but megalr has made a process group."""
    import deepspeed.comm.comm

    with mock.patch.object(deepspeed.comm.comm, "cdb", None):
        return [_start(values, in_pieces) for in_pieces in (True, False)]


def test_a_program_whose_first_engine_is_at_zero_3_starts_on_two_ranks(tmp_path: Path) -> None:
    values = _values(tmp_path)[1]
    for (_, loss, _), (_, whole_loss, _) in run_distributed(
        _start_before_deepspeed_knows_the_ranks, 2, values
    ):
        assert loss == whole_loss
