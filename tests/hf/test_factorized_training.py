"""Training a factorized folder with transformers' Trainer, PEFT and accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.hf.models import FAMILIES, lively
from tests.hf.test_factorized import METHODS, load, sample, write

ROWS = sample(4, 16).repeat(3, 1)
LABELS = ROWS.masked_fill(torch.arange(16) == 0, -100)
"""Nothing predicts the first token; Trainer 5.0 would count it among the targets."""
LR, STEPS = 1e-2, 3


class Rows(Dataset):
    """ROWS as a language-modelling data set, four a step."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": ROWS[index], "labels": LABELS[index]}


def plain_losses(model: Any) -> list[float]:
    """Losses of STEPS updates of AdamW on ROWS, in order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for rows in ROWS.split(4):
        loss = model(input_ids=rows, labels=rows).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("method", ["low_rank", "sltrain"])
def test_trainer_makes_the_updates_of_a_plain_loop(method: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (extra dev)")
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    model = load(write(lively(METHODS[method]), tmp_path / "out")).train()
    expected_model = copy.deepcopy(model)
    expected = plain_losses(expected_model)
    assert expected[-1] < expected[0] - 0.01
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=STEPS,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    found = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(expected, abs=1e-3)  # logged with four digits
    again = load(tmp_path / "trained" / f"checkpoint-{STEPS}")
    with torch.no_grad():
        logits = again(sample()).logits
        torch.testing.assert_close(logits, model.eval()(sample()).logits, atol=0, rtol=0)
        expected_logits = expected_model.eval()(sample()).logits
        torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family, method", [("llama", "low_rank"), ("gpt2", "lora")])
def test_gradient_checkpointing_gives_the_same_gradients(
    family: str, method: str, tmp_path: Path
) -> None:
    folder = write(lively(METHODS[method], **FAMILIES[family][0]), tmp_path / "out")
    gradients = []
    for recompute in (False, True):
        model = load(folder)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ROWS, labels=ROWS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(float(grad.abs().max()) > 0 for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=0, rtol=0)


@pytest.mark.parametrize("targets", ["all-linear", ["b"], ["q_proj.b", "shared_a", "down_proj.a"]])
def test_an_adapter_of_peft_trains_merges_and_loads(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra dev)")
    folder = write(lively(METHODS["low_rank"]), tmp_path / "out")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), config)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = plain_losses(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(sample()).logits
        again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(sample()).logits, expected, atol=0, rtol=0)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(sample()).logits, expected, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        final = load(tmp_path / "merged")
        torch.testing.assert_close(final(sample()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
def test_a_device_map_is_followed(device_map: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate (extra dev)")
    decoder = lively(METHODS["sltrain"])
    folder = write(decoder, tmp_path / "out")
    options: dict[str, Any] = {"device_map": device_map}
    if device_map == "disk":  # one block on the disk, loaded when it computes
        places = {f"model.layers.{number}": place for number, place in enumerate(("cpu", "disk"))}
        others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places |= dict.fromkeys(others, "cpu")
        options = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    model = load(folder, **options)
    with torch.no_grad():
        logits = model(sample()).logits
        torch.testing.assert_close(logits, decoder(sample()), atol=1e-5, rtol=1e-5)
