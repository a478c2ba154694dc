"""Calibration: text through the dense model, second moments of the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megalr.compression.dense_model import BlockLinear, DenseModel
from megalr.data import open_training_data
from megalr.data.dataset import NO_TARGET
from megalr.data.manifest import MANIFEST_NAME
from megalr.errors import UserError
from megalr.hf.init_from_pretrained import check_same_tokenizers
from megalr.preprocessing.tokenizer import holds_tokenizer, open_tokenizer
from megalr.readers.documents import DocumentReader, ReadOptions
from megalr.readers.input_splits import plan_splits
from megalr.run.metrics_reader import perplexity_of

LONGEST = 2048
"""Tokens of a window, unless the model is meant for fewer."""
HELD_OUT = 8
"""Of this number of windows one is kept for perplexities."""
READERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that read the same input as another one of their parent."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What the model reads.

    Attributes:
        data: one data folder of megalr, or files of text as ``tools/preprocess_c4.py`` takes them.
        tokens: number to read, whole windows only.
    """

    data: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Windows:
    """Token ids (windows, S), int64, for statistics and for perplexities."""

    statistics: torch.Tensor
    held_out: torch.Tensor


def read_windows(model: DenseModel, options: CalibrationOptions, widest: BlockLinear) -> Windows:
    """The first windows of the text, or evenly spaced ones of a data folder's training split.

    ``widest``: the linear layer with the widest input.

    Raises:
        UserError: data that cannot be read or have another tokenizer, text without a tokenizer in
            the model's folder, or fewer tokens than the widest input has numbers: their second
            moment would leave directions unknown.
    """
    config: Any = model.config
    length = min(config.max_position_embeddings, LONGEST)
    wanted = max(1, options.tokens // length)
    first = Path(options.data[0])
    if (first / MANIFEST_NAME).is_file():
        if len(options.data) > 1:
            raise UserError(f"--calibration: give one data folder, {first}, or files of text")
        ids = _of_data_folder(model, first, length, wanted)
    else:
        ids = _of_text(model, options.data, length, wanted)
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    if len(ids):
        held[-1] |= not bool(held.any())
    windows = Windows(ids[~held], ids[held])
    if windows.statistics.numel() < widest.inputs:
        raise UserError(
            f"--calibration: {windows.statistics.numel()} tokens (in windows of {length}, besides "
            f"those kept for perplexities) for inputs of {widest.inputs} numbers, of "
            f"{widest.name}: give more text, or raise --calibration_tokens"
        )
    return windows


def _of_data_folder(model: DenseModel, folder: Path, length: int, wanted: int) -> torch.Tensor:
    data = open_training_data([str(folder)], sequence_length=length)
    if holds_tokenizer(model.folder):
        check_same_tokenizers(data, model.folder)
    _check_vocabulary(model, str(folder), data.vocab_size)
    total = data.num_samples
    samples = np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64))
    inputs, labels = data.read(samples)
    whole = (labels != NO_TARGET).all(axis=1)  # the last window of a shard may be padded
    return torch.from_numpy(inputs[whole])


def _of_text(model: DenseModel, data: Sequence[str], length: int, wanted: int) -> torch.Tensor:
    if not holds_tokenizer(model.folder):
        raise UserError(
            f"{model.folder}: holds no tokenizer to read text with: add its files, or give a data "
            "folder to --calibration"
        )
    tokenizer = open_tokenizer(model.folder)
    _check_vocabulary(model, str(tokenizer.path), tokenizer.vocab_size)
    parts, count = [], 0
    for split in plan_splits(data, split_bytes=1 << 60).values():
        for texts in DocumentReader(split, ReadOptions()):
            ids, _ = tokenizer.encode(texts, append_eos=tokenizer.eos_id is not None)
            parts.append(ids)
            count += len(ids)
            if count >= wanted * length:
                break
        if count >= wanted * length:
            break
    whole = min(wanted, count // length)
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return torch.from_numpy(stream[: whole * length].astype(np.int64)).view(whole, length)


def _check_vocabulary(model: DenseModel, where: str, size: int) -> None:
    if size > model.config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {size} ids and the model {model.config.vocab_size}: use "
            "the model's own tokenizer"
        )


def source_of_input(name: str) -> str:
    """The name of the layer under which the moment of a layer's input is kept."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{READERS.get(leaf, leaf)}"


@torch.no_grad()
def second_moments(
    causal: nn.Module, names: Iterable[str], windows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``C = mean over tokens of x x^T`` (n, n), float32, of the inputs x of linear layers.

    Args:
        causal: transformers' causal language model, in evaluation mode.
        names: full names of linear layers; C is kept under :func:`source_of_input` of them.
        windows: token ids (windows, S).
    """
    moments: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()  # (tokens, n)
        if name not in moments:
            moments[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
        moments[name].addmm_(flat.mT, flat, alpha=1 / windows.numel())

    handles = [
        causal.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: add(name, inputs[0])
        )
        for name in dict.fromkeys(map(source_of_input, names))
    ]
    device = next(causal.parameters()).device
    for window in windows:
        causal(window[None].to(device), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return moments


@torch.no_grad()
def perplexity(causal: nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean of -log p(token | those before it in its window), over all but the first."""
    device = next(causal.parameters()).device
    total = 0.0
    for window in windows.to(device):  # (S,)
        logits = causal(window[None], use_cache=False).logits[0, :-1].float()  # (S - 1, V)
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return perplexity_of(total / (windows.shape[0] * (windows.shape[1] - 1)))
