"""Every family trains from random weights, the same on two ranks, and is exported and imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import megalr.hf.auto  # noqa: F401  (factorized folders without their own code)
from megalr.errors import UserError
from megalr.evaluation.offline import Request, evaluate_model, evaluate_run
from megalr.hf.export_run import NO_TOKENIZER, export_run
from megalr.hf.init_from_pretrained import import_weights
from megalr.hf.names import dense_state_dict
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.trained_run import load_decoder, open_verified
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from tests.models.settings import full_rank
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero

CPU = torch.device("cpu")
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "original_max_positions": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_embeddings": True},
    "mistral": {
        "hidden_size": 50,
        "head_dim": 16,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "qwen2": {"attention_bias": True, "sliding_window": 7, "window_layers": [False, True]},
    "qwen3": {
        "qk_norm": "head",
        "head_dim": 16,
        "tie_embeddings": True,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_positions": 16},
    },
    "smollm3": {"rope_layers": [True, False]},
    "olmo2": {"qk_norm": "full", "norm_order": "post", "rope_theta": 5e5},
    "phi3": {"partial_rotary_factor": 0.5, "head_dim": 20},
    "gpt2": {
        "num_kv_heads": 4,
        "norm": "layernorm",
        "positions": "learned",
        "max_positions": 24,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "attention_bias": True,
        "output_bias": True,
        "tie_embeddings": True,
    },
}
SHORT: dict[str, dict[str, Any]] = {
    "train": {"updates": 3, "global_batch_size": 4, "micro_batch_size": 2},
    "schedule": {"warmup_updates": 0},
    "optimizer": {"lr": 0.003},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 0},
}


def _run(folder: Path, data: Path, family: str, stage: int, world: int, **sections: dict) -> None:
    values = settings(folder, data, model=FAMILIES[family], **{**SHORT, **sections})
    run_distributed(run, world, values, zero(stage))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factorized_run_on_tensor_parallel_ranks_has_the_losses_of_one(
    family: str, data: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    _run(alone, data, family, 0, 1)
    layout = "bottleneck" if family in ("qwen3", "olmo2", "smollm3") else "column_row"
    _run(shared, data, family, 1, 2, parallel={"tensor": 2, "layout": layout})
    assert len(losses(alone)) == 3
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_run_is_exported_and_imported_bit_by_bit(
    family: str, data: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    _run(folder, data, family, 3, 1, method={"name": "full_rank"})
    assert losses(folder)[-1] < losses(folder)[0]
    checkpoint = export_run(folder, None, out, "float32", "5GB", NO_TOKENIZER)
    trained = load_decoder(folder, open_verified(folder, None))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == family and checkpoint.update == 3

    imported = build_decoder(decoder_config(None, pretrained_sizes(out)), full_rank(), seed=9)
    import_weights(out, imported, CPU)
    ours, theirs = dense_state_dict(trained), dense_state_dict(imported)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.randint(0, trained.config.vocab_size, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(imported(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    request = Request(data=(str(data),), sequence_length=24)
    expected = evaluate_run(folder, None, Request(), CPU)["loss"]
    assert evaluate_model(out, request, CPU)["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", ["dense", "factorized"])
def test_a_gpt2_run_with_restarts_is_exported(form: str, data: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    _run(folder, data, "gpt2", 2, 1, restarts={"every": 2}, train={**SHORT["train"], "updates": 4})
    assert [event["matrices"] for event in events(folder, "restart")] == [12]
    export_run(folder, None, out, "float32", "5GB", NO_TOKENIZER, form)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False).train()
    assert model.config.model_type == {"dense": "gpt2", "factorized": "megalr_gpt2"}[form]
    trained = load_decoder(folder, open_verified(folder, None))
    ids = torch.randint(0, trained.config.vocab_size, (2, 24))
    with torch.no_grad():  # in train mode: an export has no dropout, as training has none
        torch.testing.assert_close(trained(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    request = Request(data=(str(data),), sequence_length=24)
    expected = evaluate_run(folder, None, Request(), CPU)["loss"]
    assert evaluate_model(out, request, CPU)["loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match=r"--sequence_length 25: the model .* is meant for 24"):
        evaluate_model(out, Request(data=(str(data),), sequence_length=25), CPU)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpt2_run_has_the_same_losses_under_every_zero_stage(
    stage: int, data: Path, tmp_path: Path
) -> None:
    for name, zero_stage, ranks in (("alone", 0, 1), ("shared", stage, 2)):
        _run(tmp_path / name, data, "gpt2", zero_stage, ranks, method={"name": "full_rank"})
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_run_goes_on_from_an_exported_model_of_another_family(
    family: str, data: Path, tmp_path: Path
) -> None:
    _run(tmp_path / "run", data, family, 0, 1, method={"name": "full_rank"})
    out = tmp_path / "out"
    export_run(tmp_path / "run", None, out, "float32", "5GB", NO_TOKENIZER)
    values = settings(tmp_path / "next", data, **SHORT)
    values["model"] = {"from_pretrained": str(out), "pad_multiple": 16}
    values["checkpoint"] = {"every": 1, "keep_last": 3}
    run_distributed(run, 1, values, zero(1))
    unbroken = losses(tmp_path / "next")
    values["run"]["resume"] = "must"
    for update in (2, 3):
        folder = tmp_path / "next" / "checkpoints" / f"update_{update}"
        folder.rename(tmp_path / folder.name)
    (tmp_path / "next" / "metrics.jsonl").unlink()
    out.rename(tmp_path / "gone")  # the sizes are in the run's own folder
    run_distributed(run, 1, values, zero(1))
    assert losses(tmp_path / "next") == unbroken[1:]
