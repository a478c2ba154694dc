"""Fine-tuning of exported models: labels that a word decides are learned, dense and factorized."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from megalr.errors import UserError
from megalr.hf.write import ExportOptions, write_model
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.hf.models import GPT2, lively
from tests.models.settings import full_rank, low_rank
from tests.preprocessing.corpus import VOCAB_SIZE, prose, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "study"))

import finetune  # noqa: E402

FORMS = {
    "dense": (full_rank(), {}),
    "factorized": (low_rank(), {}),
    "gpt2": (full_rank(), {**GPT2, "max_positions": 64, "tie_embeddings": True}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models with a tokenizer."""
    home, tokenizer = tmp_path_factory.mktemp("exports"), open_tokenizer(tiny_tokenizer())
    for name, (method, sizes) in FORMS.items():
        form = "factorized" if name == "factorized" else "dense"
        options = ExportOptions("float32", "5GB", 64, None, form)
        decoder = lively(method, **{**sizes, "vocab_size": VOCAB_SIZE})
        write_model(decoder, home / name, options, tokenizer, "card")
    return {name: home / name for name in FORMS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 short texts; the last word tells the label."""
    path, choose = tmp_path_factory.mktemp("texts") / "texts.csv", random.Random(0)
    words = sorted({word for line in prose(20, seed=5) for word in line.split()})
    rows = [[" ".join(choose.choices(words, k=choose.randint(1, 8)))] for _ in range(150)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "mood"])
        for number, (text,) in enumerate(rows):
            mood, word = [("up", words[0]), ("down", words[1])][number % 2]
            writer.writerow([f"{text} {word}", mood])
        writer.writerow([f"{rows[0][0]} {words[0]}", "up"])  # a repeated text counts once
    return path


def test_labels_are_learned_with_every_seed(
    exports: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "table.csv"
    two = [exports["factorized"], exports["gpt2"]]
    words = ["finetune.py", *map(str, two), "--texts", str(texts), "--csv"]
    words += [str(target), "--label_column", "mood", "--train", "90", "--validation", "20"]
    words += ["--test", "30", "--lr", "1e-9", "5e-3", "--seeds", "2", "--epochs", "5"]
    monkeypatch.setattr(sys, "argv", [*words, "--batch", "10"])
    finetune.main()
    rows = list(csv.DictReader(target.open(encoding="utf-8")))
    assert len(rows) == 2 * 2 * 2
    assert {(r["model"], r["seed"]) for r in rows} == {(f.name, s) for f in two for s in "01"}
    learned = [float(r["test_accuracy"]) for r in rows if r["learning_rate"] == "0.005"]
    assert min(learned) > 0.9 and len(learned) == 4
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert all("2 seeds, lr 0.005" in line for line in printed)


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name: str, exports: dict[str, Path]) -> None:
    torch.manual_seed(0)
    model = finetune.Classifier(AutoModel.from_pretrained(exports[name]), 3).eval()
    ids, lengths = torch.randint(3, VOCAB_SIZE, (2, 9)), torch.tensor([4, 9])
    both = finetune.Texts(ids, lengths, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        logits = model(both)
        alone = model.base(input_ids=ids[:1, :4])[0][0, -1]
        torch.testing.assert_close(logits[0], model.head(alone), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[:1], model(both.part(torch.tensor([0]))))


def test_mistakes_are_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no column label: give --text_column"):
        finetune.read_texts(texts, "text", "label")
    assert len(finetune.read_texts(texts, "text", "mood")) == 150
    words = ["finetune.py", "x", "--texts", str(texts), "--label_column", "mood", "--csv", "t.csv"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="150 texts, 9000 are wanted: lower --train"):
        finetune.main()
    monkeypatch.setattr(sys, "argv", [*words, "--train", "9", "--validation", "9", "--test", "9"])
    with pytest.raises(UserError, match="x: no model with a tokenizer for transformers"):
        finetune.main()
