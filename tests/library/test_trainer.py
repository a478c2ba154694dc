"""RestartsCallback in Hugging Face's Trainer: resumed against unbroken, callback against loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megalr
from tests.library.models import batch, llama
from tests.ranks import run_distributed

pytest.importorskip("accelerate")
ROWS = [{"input_ids": row, "labels": row} for row in batch(0, rows=16, length=8, vocabulary=40)]
RESTARTS = {"every": 3, "lr_recovery": "linear", "recovery_updates": 2}


def model_of() -> nn.Module:
    return megalr.factorize_(llama(), rank=4, init="kaiming")


def trainer_of(folder: Path, model: nn.Module, callback: Any, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    optimizers = settings.pop("optimizers", (None, None))
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_strategy="no", report_to=[], disable_tqdm=True, seed=1,
        **{"max_steps": 8, "save_steps": 4, **settings},
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=ROWS, callbacks=[callback], optimizers=optimizers
    )


def galore(model: nn.Module) -> torch.optim.Optimizer:
    matrices, others = megalr.split_parameters(model)
    groups = [{"params": matrices, "rank": 2, "update_proj_gap": 3}, {"params": others}]
    return megalr.optim.GaLore(groups, lr=1e-2)


IMBALANCE = {"imbalance_threshold": 0.001, "imbalance_every": 3}


@pytest.mark.parametrize(
    ("make", "restarts"),
    [(None, RESTARTS), (galore, RESTARTS), (None, {**RESTARTS, "every": None, **IMBALANCE})],
    ids=["Trainer's AdamW", "GaLore", "by imbalance"],
)
def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, make: Any, restarts: dict[str, Any]
) -> None:
    from megalr.transformers import RestartsCallback

    def trained(resume: str | None) -> tuple[nn.Module, list]:
        model = model_of()
        optimizers = (None if make is None else make(model), None)
        callback = RestartsCallback(**restarts)
        trainer = trainer_of(tmp_path, model, callback, optimizers=optimizers)
        trainer.train(resume_from_checkpoint=resume)
        return model, callback.reports

    whole, reports = trained(None)
    again, rest = trained(str(tmp_path / "checkpoint-4"))  # in the middle of a recovery
    assert [report.update for report in reports] == [3, 6]
    assert [report.update for report in rest] == [6]
    assert all(report.refactorized and report.fraction_reset == 1 for report in reports)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_trainer_with_the_callback_is_a_loop_with_restarts(tmp_path: Path) -> None:
    from transformers import default_data_collator

    from megalr.transformers import RestartsCallback

    model = model_of()
    callback = RestartsCallback(**RESTARTS)
    # Adam divides a gradient near zero by its own size: roundings of another kernel, such as the
    # fused one of the Trainer's default, become updates. So both take the same.
    trainer = trainer_of(
        tmp_path, model, callback, max_grad_norm=0.0, save_strategy="no", optim="adamw_torch"
    )
    batches = []
    trainer.data_collator = lambda rows: batches.append(rows) or default_data_collator(rows)
    trainer.train()

    loop = model_of()
    optimizer = torch.optim.AdamW(loop.parameters(), lr=1e-2, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 8)  # Trainer's default
    restarts = megalr.Restarts(loop, optimizer, **RESTARTS)
    for rows in batches[:8]:
        optimizer.zero_grad()
        loop(**default_data_collator(rows)).loss.backward()
        optimizer.step()
        restarts.step()
        rate.step()
    for p, q in zip(model.parameters(), loop.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_second_training_has_hooks_of_its_own_only(tmp_path: Path) -> None:
    from megalr.transformers import RestartsCallback

    rates: list[float] = []

    class Recording(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = model_of()
    optimizer = Recording(model.parameters(), lr=1e-2)
    callback = RestartsCallback(every=1, lr_recovery="linear", recovery_updates=1)
    trainer = trainer_of(
        tmp_path, model, callback, max_steps=3, save_strategy="no",
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )  # fmt: skip
    trainer.train()
    trainer.train()
    assert rates == pytest.approx([0.01, 0.005, 0.005] * 2)


def test_settings_are_checked_before_the_first_update(tmp_path: Path) -> None:
    from megalr.transformers import RestartsCallback

    with pytest.raises(TypeError, match="refactorise_every"):
        RestartsCallback(refactorise_every=3)
    trainer = trainer_of(tmp_path, llama(), RestartsCallback(every=3))
    with pytest.raises(megalr.UserError, match="no factorized layers"):
        trainer.train()


def _on_two_ranks(folder: str) -> tuple[list, list[torch.Tensor]]:
    from megalr.transformers import RestartsCallback

    model = model_of()
    callback = RestartsCallback(**RESTARTS)
    trainer = trainer_of(Path(folder), model, callback, save_strategy="no")
    assert trainer.args.parallel_mode.value == "distributed"
    trainer.train()
    return [r.update for r in callback.reports], [p.detach() for p in model.parameters()]


def test_under_ddp_the_ranks_restart_together_and_stay_equal(tmp_path: Path) -> None:
    (updates, one), (_, two) = run_distributed(_on_two_ranks, 2, str(tmp_path))
    assert updates == [3, 6]
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
