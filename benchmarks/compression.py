"""Perplexity of a small dense model after factorization, with and without calibration.

A LLaMA of a million numbers is trained on text on the CPU, then factorized at several ranks.
Perplexities are of other text, of which neither training nor calibration has seen a document.

python benchmarks/compression.py --text TRAIN.json.gz --held_out OTHER.json.gz --output results
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import provenance, save
from transformers import LlamaConfig, LlamaForCausalLM

from megalr.compression.calibration import CalibrationOptions, perplexity
from megalr.compression.compress import CompressionOptions, compress_folder
from megalr.hf.modeling_factorized import FACTORIZED
from megalr.preprocessing.tokenizer import SENTENCEPIECE_NAME, Tokenizer, open_tokenizer
from megalr.preprocessing.tokenizer_training import train_tokenizer
from megalr.readers.documents import DocumentReader, ReadOptions
from megalr.readers.input_splits import plan_splits

VOCABULARY, LENGTH, BATCH = 2048, 128, 8
SHARES = (0.125, 0.25, 0.5)
TOKENS = 32_768
FEWER = (2_048, 8_192)
"""Calibration tokens that are tried besides, at the middle share."""
HELD_OUT_WINDOWS = 128


def read_ids(tokenizer: Tokenizer, files: list[str], most: int) -> torch.Tensor:
    """Windows (n, LENGTH) of the first ``most`` tokens of the files."""
    parts: list[Any] = []
    splits = plan_splits(files, split_bytes=1 << 60).values()
    for texts in chain.from_iterable(DocumentReader(split, ReadOptions()) for split in splits):
        parts.append(tokenizer.encode(texts, append_eos=True)[0])
        if sum(map(len, parts)) >= most:
            break
    ids = np.concatenate(parts)[:most].astype(np.int64)
    return torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def train(windows: torch.Tensor, updates: int) -> tuple[Any, float]:
    """A LLaMA after AdamW with a cosine to zero, and its last losses' mean."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates, pct_start=0.05)
    order = torch.randperm(len(windows))
    losses = []
    for update in range(updates):
        rows = order[torch.arange(update * BATCH, (update + 1) * BATCH) % len(order)]
        loss = model(windows[rows], labels=windows[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if update % 100 == 0:
            print(f"update {update}: loss {losses[-1]:.3f}", flush=True)
    return model.eval(), float(np.mean(losses[-20:]))


def measure(
    folder: Path, share: float, text: tuple[str, ...], tokens: int, held_out: torch.Tensor
) -> dict[str, Any]:
    """One factorized folder: its size, its perplexity, seconds; ``tokens`` 0: without text."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "out"
        calibration = CalibrationOptions(text, tokens) if tokens else None
        outcome = compress_folder(folder, output, CompressionOptions(rank_share=share), calibration)
        seconds = time.perf_counter() - started
        causal: Any = FACTORIZED["llama"][2]
        model = causal.from_pretrained(output)
        row = {
            "rank_share": share,
            "calibration_tokens": tokens,
            "parameters": outcome.numbers[1],
            "perplexity": round(perplexity(model.eval(), held_out), 3),
            "mean_error": round(float(np.mean(list(outcome.errors.values()))), 4),
            "seconds": round(seconds, 1),
        }
    print(row, flush=True)
    return row


def main() -> None:
    """Train, factorize, record."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="files to train and calibrate with")
    add("--held_out", nargs="+", required=True, help="files to evaluate with")
    add("--updates", type=int, default=400)
    add("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = provenance(("torch", "transformers"))
    text = tuple(arguments.text)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        train_tokenizer(text, Path(place) / "tokenizer", VOCABULARY, ReadOptions(), 2_000_000)
        tokenizer = open_tokenizer(Path(place) / "tokenizer" / SENTENCEPIECE_NAME)
        windows = read_ids(tokenizer, arguments.text, arguments.updates * BATCH * LENGTH)
        held_out = read_ids(tokenizer, arguments.held_out, HELD_OUT_WINDOWS * LENGTH)
        model, loss = train(windows, arguments.updates)
        model.save_pretrained(folder)
        tokenizer.copy_to(folder)
        result |= {
            "updates": arguments.updates,
            "training_tokens": arguments.updates * BATCH * LENGTH,
            "distinct_training_tokens": windows.numel(),
            "training_loss": round(loss, 3),
            "held_out_tokens": held_out.numel(),
            "dense": {
                "parameters": sum(p.numel() for p in model.parameters()),
                "perplexity": round(perplexity(model, held_out), 3),
            },
        }
        cases = [(share, tokens) for share in SHARES for tokens in (0, TOKENS)]
        cases += [(SHARES[1], tokens) for tokens in FEWER]
        result["factorized"] = [
            measure(folder, share, text, tokens, held_out) for share, tokens in cases
        ]
    save("compression", result, arguments.output)


if __name__ == "__main__":
    main()
