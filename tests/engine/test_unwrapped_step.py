"""Updates without a DeepSpeed wrapper (ZeRO 0, paper_bf16 or fp32) are those of plain torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.data.loader import UpdateBatch
from megalr.engine.build import build_engine
from megalr.engine.config import resolve_deepspeed_config
from megalr.engine.skip_step import poison_nonfinite
from megalr.engine.unwrapped_step import install_clip_and_skip
from megalr.models.build import build_model
from megalr.models.decoder import Decoder
from megalr.optim import SPAM
from megalr.training.step import train_step
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero

UPDATES, MICRO_BATCHES = 4, 2
RATE = 0.01
SLTRAIN = {"name": "sltrain", "rank": 8, "alpha": 16.0, "density": 0.1}


def _micro_batch(update: int, rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * update + 10 * rank + number)
    ids = torch.randint(0, 120, (2, 25), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _config(world: int, **train: Any) -> RunConfig:
    train = {"precision": "paper_bf16", "global_batch_size": 2 * MICRO_BATCHES * world, **train}
    return RunConfig.model_validate(
        settings(Path("unused"), Path("unused"), train=train, method=SLTRAIN)
    )


def _updates(world: int, train: dict[str, Any]) -> dict[str, Any]:
    """Losses of this rank, norms, weights, first moments and dtypes after UPDATES updates."""
    config = _config(world, **train)
    decoder = build_model(config, torch.device("cpu"))
    engine = build_engine(config, resolve_deepspeed_config(config, zero(0), "test", world), decoder)
    assert engine.optimizer is engine.basic_optimizer
    rank = torch.distributed.get_rank()
    made = []
    for update in range(UPDATES):
        micro = [_micro_batch(update, rank, number) for number in range(MICRO_BATCHES)]
        batch = UpdateBatch(update, micro, world * MICRO_BATCHES * 48, (0,))
        made.append(train_step(engine, batch, update + 1, RATE))
    assert all(m.applied for m in made) and engine.skipped_steps == 0
    states = engine.basic_optimizer.state
    found = {
        "losses": [float(m.loss_sum) for m in made],
        "norms": [float(m.norm) for m in made],
        "weights": {name: p.detach().clone() for name, p in decoder.named_parameters()},
        "moments": {n: states[p]["exp_avg"].clone() for n, p in decoder.named_parameters()},
        "dtypes": {p.dtype for p in decoder.parameters()}
        | {v.dtype for s in states.values() for k, v in s.items() if k != "step"},
        "buffers": {b.dtype for b in decoder.buffers()},
    }
    engine.destroy()
    return found


def _plain_torch(world: int, train: dict[str, Any], clipping: float) -> dict[str, Any]:
    """The same updates by a loop of plain torch in one process: what each rank would see."""
    config = _config(world, **train)
    decoder = build_model(config, torch.device("cpu")).to(
        torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    )
    vectors = [p for name, p in decoder.named_parameters() if "norm" in name]
    matrices = [p for name, p in decoder.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=RATE,
        fused=True,
    )
    found: dict[str, Any] = {"losses": [[] for _ in range(world)], "norms": []}
    for update in range(UPDATES):
        sums = []
        for rank in range(world):
            optimizer.zero_grad()
            total = 0.0
            for number in range(MICRO_BATCHES):
                ids, labels = _micro_batch(update, rank, number)
                loss = decoder(ids, labels) * (1 / (MICRO_BATCHES * 48))
                loss.backward()
                total += float(loss.detach() / (1 / (MICRO_BATCHES * 48)))
            found["losses"][rank].append(total)
            sums.append([p.grad for p in decoder.parameters()])
        squares = 0.0
        for parameter, *grads in zip(decoder.parameters(), *sums, strict=True):
            parameter.grad = sum(grads[1:], grads[0]) / world
            squares += float(parameter.grad.double().square().sum())
        found["norms"].append(squares**0.5)
        if clipping:
            scale = min(1.0, clipping / squares**0.5)
            for parameter in decoder.parameters():
                parameter.grad = (parameter.grad.double() * scale).to(parameter.dtype)
        optimizer.step()
    found["weights"] = {name: p.detach() for name, p in decoder.named_parameters()}
    found["moments"] = {n: optimizer.state[p]["exp_avg"] for n, p in decoder.named_parameters()}
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_pure_bf16_without_zero_is_bitwise_a_loop_of_plain_torch(world: int) -> None:
    options = {"gradient_clipping": 0.0}
    expected = _plain_torch(world, options, 0.0)
    for rank, found in enumerate(run_distributed(_updates, world, world, options)):
        assert found["losses"] == expected["losses"][rank]
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        for name, weight in expected["weights"].items():
            assert torch.equal(found["weights"][name], weight), name
        assert found["dtypes"] == {torch.bfloat16} and found["buffers"] == {torch.int32}


@pytest.mark.parametrize("precision, rounding", [("fp32", 1e-5), ("paper_bf16", 2e-2)])
def test_clipped_updates_are_those_of_plain_torch(precision: str, rounding: float) -> None:
    options = {"gradient_clipping": 0.1, "precision": precision}
    expected = _plain_torch(2, options, 0.1)
    assert min(expected["norms"]) > 0.2  # all are clipped
    for found in run_distributed(_updates, 2, 2, options):
        assert found["norms"] == pytest.approx(expected["norms"], rel=rounding)
        for kind in ("weights", "moments"):
            for name, tensor in expected[kind].items():
                distance = (found[kind][name].double() - tensor.double()).norm()
                assert distance <= rounding * tensor.double().norm(), (kind, name)


def _bare_engine(decoder: Decoder, optimizer: torch.optim.Optimizer, clipping: float) -> Any:
    """What of an engine ``install_clip_and_skip`` works on, without DeepSpeed."""
    return SimpleNamespace(
        optimizer=optimizer,
        module=decoder,
        dp_world_size=1,
        gradient_clipping=lambda: clipping,
        enable_backward_allreduce=True,
    )


@pytest.mark.parametrize("kind", ["fused", "foreach", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gradient_that_is_not_finite_changes_nothing(
    kind: str, dtype: torch.dtype
) -> None:
    decoder = build_model(_config(1), torch.device("cpu")).to(dtype)
    make = {
        "fused": lambda: torch.optim.AdamW(decoder.parameters(), lr=0.1, fused=True),
        "foreach": lambda: torch.optim.AdamW(decoder.parameters(), lr=0.1, foreach=True),
        "own": lambda: SPAM(decoder.parameters(), lr=0.1),
    }
    optimizer = make[kind]()
    install_clip_and_skip(_bare_engine(decoder, optimizer, 1.0))

    def state() -> list[torch.Tensor]:
        values = [v for entry in optimizer.state.values() for v in entry.values()]
        return [torch.as_tensor(v).clone() for v in (*decoder.parameters(), *values)]

    def step(bad: float | None) -> bool:
        ids, labels = _micro_batch(0, 0, 0)
        loss = decoder(ids, labels) * (1 / 48)
        optimizer.zero_grad()
        poison_nonfinite(loss).backward()
        if bad is not None:
            next(decoder.parameters()).grad.view(-1)[3] = bad
        before = state()
        optimizer.step()
        after = state()
        # The fused kernel leaves out by itself once there are moments, and nobody has waited.
        on_device = kind == "fused" and len(before) > len(list(decoder.parameters()))
        assert isinstance(optimizer.skipped, torch.Tensor) == on_device
        assert bool(optimizer.skipped) == (bad is not None)
        assert bool(torch.isfinite(optimizer._global_grad_norm)) == (bad is None)
        return len(before) == len(after) and all(map(torch.equal, before, after))

    assert step(float("nan")) and not optimizer.state  # before the first: no moments are made
    assert not step(None)
    assert step(float("inf")) and step(float("nan"))
    assert not step(None)
    assert all(torch.isfinite(p).all() for p in decoder.parameters())


def test_restarted_runs_in_pure_bf16_are_bitwise_those_of_zero_1(
    data: Path, tmp_path: Path
) -> None:
    options = {"precision": "paper_bf16", "gradient_clipping": 0.0}
    restarts = {"every": 4, "verify": True}
    found = []
    for stage in (0, 1):
        folder = tmp_path / str(stage)
        values = settings(folder, data, train=options, restarts=restarts)
        run_distributed(run, 2, values, zero(stage))
        done = [(e["update"], e["matrices"], e["reset"]) for e in events(folder, "restart")]
        assert done == [(4, 14, True), (8, 14, True)]
        found.append((losses(folder), [e["loss"] for e in events(folder, "eval")]))
    assert found[0] == found[1]
