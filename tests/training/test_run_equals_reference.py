"""A sharded run makes the same updates as transformers' model and torch's AdamW in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megalr.config.schema import RunConfig
from megalr.data import open_training_data, open_validation_data
from megalr.hf.names import dense_state_dict
from megalr.models.build import build_model
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero

FULL = {"method": {"name": "full_rank"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def _hf_model(config: RunConfig) -> transformers.PreTrainedModel:
    """transformers' LLaMA with the weights of the run's decoder."""
    decoder = build_model(config, torch.device("cpu"))
    sizes = decoder.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.kv_heads,
            rms_norm_eps=sizes.norm_eps,
            attn_implementation="eager",
        )
    )
    model.load_state_dict(dense_state_dict(decoder))
    return model


def _learning_rate(t: int, peak: float, warmup: int, total: int, floor: float) -> float:
    if t < warmup:
        return peak * t / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))
    return peak * (floor + (1 - floor) * cosine)


def _reference(values: dict[str, Any]) -> tuple[list[float], list[float], dict[int, float]]:
    """Losses, gradient norms and validation losses of a plain loop over whole batches."""
    config = RunConfig.model_validate(values)
    model = _hf_model(config)
    decay = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    options = {"sequence_length": 24, "packing": config.data.packing}
    train = open_training_data(config.data.train[0].path, **options)
    held_out = open_validation_data(config.data.train[0].path, **options)
    found, norms, validation = [], [], {}

    def mean_loss(samples: np.ndarray, dataset: Any) -> torch.Tensor:
        ids, labels = (torch.from_numpy(a) for a in dataset.read(samples))
        return torch.nn.functional.cross_entropy(
            model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )

    for t in range(config.train.updates):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(t, 0.01, 3, config.train.updates, 0.1)
        samples = train.sample_ids(np.arange(t * 12, t * 12 + 12), config.run.seed)
        loss = mean_loss(samples, train)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        found.append(loss.item())
        if (t + 1) % 5 == 0:
            with torch.no_grad():
                every = np.arange(held_out.num_samples)
                validation[t + 1] = mean_loss(every, held_out).item()
    return found, norms, validation


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "one_document_a_sample"])
def reference(request: pytest.FixtureRequest, data: Path) -> tuple[bool, tuple]:
    values = settings(Path("unused"), data, data={"packing": request.param}, **FULL)
    return request.param, _reference(values)


@pytest.mark.parametrize(
    "world_size, ds_user",
    [(1, zero(0)), (2, zero(0)), (2, zero(1)), (3, zero(2)), (2, zero(2, **OFFLOAD)), (2, zero(3))],
    ids=["plain", "zero0", "zero1", "zero2_3ranks", "zero2_offload", "zero3"],
)
def test_losses_norms_and_evaluation_equal_a_plain_loop(
    world_size: int, ds_user: dict, reference: tuple, data: Path, tmp_path: Path
) -> None:
    packing, (expected, norms, validation) = reference
    folder = tmp_path / "run"
    values = settings(folder, data, data={"packing": packing}, **FULL)
    run_distributed(run, world_size, values, ds_user)
    assert losses(folder) == pytest.approx(expected, abs=1e-5)
    assert [e["gradient_norm"] for e in events(folder, "step")] == pytest.approx(norms, rel=1e-4)
    assert expected[-1] < expected[0] - 0.3
    found = {e["update"]: e["loss"] for e in events(folder, "eval")}
    assert found == pytest.approx(validation, abs=1e-5)


def test_low_rank_losses_do_not_depend_on_ranks_stage_or_micro_batch(
    data: Path, tmp_path: Path
) -> None:
    found = []
    for number, (world_size, stage, micro) in enumerate([(1, 0, 12), (2, 2, 3), (3, 1, 2)]):
        folder = tmp_path / str(number)
        values = settings(folder, data, train={"micro_batch_size": micro})
        run_distributed(run, world_size, values, zero(stage))
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.long
def test_bf16_and_checkpointed_runs_stay_near_float32(data: Path, tmp_path: Path) -> None:
    exact, folder = tmp_path / "fp32", tmp_path / "recomputed"
    run_distributed(run, 2, settings(exact, data), zero(1))
    options = {"activation_checkpointing": "full"}
    run_distributed(run, 2, settings(folder, data, train=options), zero(1))
    assert losses(folder) == losses(exact)
    for precision in ("bf16", "paper_bf16"):
        folder = tmp_path / precision
        values = settings(folder, data, train={"precision": precision})
        run_distributed(run, 2, values, zero(1))
        assert losses(folder) == pytest.approx(losses(exact), abs=0.05)
        assert losses(folder) != losses(exact)
