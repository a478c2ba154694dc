"""lm-eval on an exported model, with a task that needs no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalr.errors import UserError
from megalr.evaluation.lm_eval import run_tasks
from megalr.hf.write import ExportOptions, write_model
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.hf.data import write_tokenizer
from tests.hf.models import lively
from tests.models.settings import low_rank

TASK = """
task: megalr_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["w5", "w6"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_without_lm_eval_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"not installed: pip install -e '.\[lm_eval\]'"):
        run_tasks(tmp_path, ["piqa"], 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs on one process"):
        run_tasks(tmp_path, ["piqa"], 8)


@pytest.mark.parametrize("form", ["dense", "factorized"])
def test_accuracy_of_a_task_is_that_of_the_models_logits(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm_eval)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    decoder = lively(low_rank(), vocab_size=120)
    options = ExportOptions("float32", "5GB", 64, form=form)
    write_model(decoder, tmp_path / "model", options, tokenizer, "card")
    # not w10 to w19, which the tokenizer splits at w1, its end of text
    questions = [(first, first % 2) for first in range(20, 51)]
    lines = [json.dumps({"question": f"w{q} w9", "answer": a}) for q, a in questions]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "words.yaml").write_text(TASK.replace("FILE", str(tmp_path / "words.jsonl")))

    found = run_tasks(tmp_path / "model", ["megalr_words"], 4, include_path=tasks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[q, 9] for q, _ in questions])
    with torch.no_grad():
        chosen = model(ids).logits[:, -1, [5, 6]].argmax(-1).tolist()
    right = sum(choice == answer for choice, (_, answer) in zip(chosen, questions, strict=True))
    assert found["megalr_words"]["acc,none"] == pytest.approx(right / len(questions))
    with pytest.raises(UserError, match="lm-eval knows no such task"):
        run_tasks(tmp_path / "model", ["megalr_nonsense"], 4, include_path=tasks)
    with pytest.raises(UserError, match="lm-eval could not run megalr_words"):
        run_tasks(tmp_path / "nowhere", ["megalr_words"], 4, include_path=tasks)
