"""Comparison of the decoder's logits with transformers' on the weights of a folder.

Whatever a configuration means that the import misreads shows here, before any training. One short
window is computed in float32 on the CPU by both sides, one block at a time: host memory holds the
model once in the dtype of its files, and one block in float32.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalr.errors import UserError
from megalr.hf.names import (
    block_linears,
    is_stacked,
    plain_block_tensors,
    plain_tensors,
    rows_of,
)
from megalr.hf.pretrained_config import config_as_stored, first_line
from megalr.hf.read import Weights, read_weights
from megalr.layers.linear import DenseLinear
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Block, Decoder

POSITIONS = 64
"""Length of the window that is compared (tokens)."""
WINDOW = 9
"""A larger sliding window is replaced by this on both sides, so that it takes effect."""
TOLERANCE = 5e-5
"""Largest difference of a position's logits relative to their norm. In the tests two orders of
summation differ by 3e-7, a theta wrong by a tenth by 8e-5, a wrong epsilon of norms by 5e-3."""
AMPLIFIED = 30.0, 1e-2
"""A model may amplify rounding: this multiple of the effect of one unit in the last place of the
embeddings is allowed as well, up to the second number."""


def check_same_function(folder: Path, sizes: DecoderConfig) -> float:
    """Compare the decoder of ``sizes`` with transformers' model on the folder's weights.

    Returns:
        The largest difference of a position's logits, relative to the norm of all logits there.

    Raises:
        UserError: it is larger than rounding explains, or transformers cannot load the model.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(POSITIONS, sizes.position_rows or POSITIONS)
    ids = torch.randint(0, sizes.vocab_size, (1, length), generator=generator)
    weights = read_weights(folder)
    with torch.no_grad():
        expected, disturbed = _transformers_logits(folder, weights.dtype, ids)
        found = _decoder_logits(weights, sizes, ids)
    if found.shape != expected.shape:
        raise UserError(
            f"{folder}: transformers computes {expected.shape[-1]} logits, megalr {found.shape[-1]}"
            ": the model cannot be imported"
        )
    difference = _relative(found, expected)
    factor, largest = AMPLIFIED
    allowed = max(TOLERANCE, min(factor * _relative(disturbed, expected), largest))
    if not difference <= allowed:  # nor NaN
        raise UserError(
            f"{folder}: megalr's logits differ from transformers' by {difference:.1e} of their size"
            f" (allowed: {allowed:.0e}): the model has a feature that megalr does not compute, so "
            "it cannot be imported"
        )
    return difference


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference of a position's logits ``(1, S, V)``."""
    norms = expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found - expected).norm(dim=-1) / norms).max())


def _transformers_logits(
    folder: Path, dtype: torch.dtype, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(1, S, V)`` float32, and the same with embeddings changed in their last place.

    The weights stay in ``dtype`` but for the block that is computed.
    """
    from transformers import AutoModelForCausalLM

    config = config_as_stored(folder)
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = min(config.sliding_window, WINDOW)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()
    except Exception as error:  # transformers raises nearly anything for a bad folder
        raise UserError(
            f"{folder}: transformers cannot load the model ({first_line(error)})"
        ) from error
    embedding, base = model.get_input_embeddings(), model.base_model
    parts = (base.wpe, *base.h, base.ln_f) if hasattr(base, "wpe") else (*base.layers, base.norm)
    for part in (embedding, *parts, model.lm_head):
        _compute_in_float32(part)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    signs = torch.where(torch.arange(model.config.hidden_size) % 3 == 0, 1.0, -1.0)
    factor = 1 + signs * torch.finfo(torch.float32).eps
    embedding.register_forward_hook(lambda module, arguments, output: output * factor)
    return logits, model(input_ids=ids, use_cache=False).logits.float()


def _compute_in_float32(module: nn.Module) -> None:
    """Let a module compute in float32 and keep its weights in their dtype in between."""
    stored = next(module.parameters()).dtype

    def widen(module: nn.Module, arguments: Any) -> None:
        module.to(torch.float32)

    def narrow(module: nn.Module, arguments: Any, output: Any) -> None:
        module.to(stored)  # exact: the values came from this dtype

    if stored != torch.float32:
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(narrow)


def _decoder_logits(weights: Weights, sizes: DecoderConfig, ids: torch.Tensor) -> torch.Tensor:
    """``(1, S, V)`` float32, from a decoder with one block that takes every layer's weights."""
    window = sizes.sliding_window
    if window is not None:
        window = min(window, WINDOW)
    one = replace(sizes, num_layers=1, rope_layers=None, window_layers=None)
    decoder = Decoder(one, DenseLinear)
    decoder.config = replace(sizes, sliding_window=window)  # which layers rotate or have a window
    for parameter in decoder.parameters():
        parameter.zero_()  # the padding
    for name, tensor in plain_tensors(decoder):
        tensor.copy_(weights[name])
    (block,) = decoder.blocks()
    number = itertools.count()
    block.register_forward_pre_hook(lambda *_: _load_block(block, next(number), weights))
    decoder.layers = nn.ModuleList([block] * sizes.num_layers)
    logits: torch.Tensor = decoder.eval()(ids)
    return logits


def _load_block(block: Block, number: int, weights: Weights) -> None:
    for name, tensor in plain_block_tensors(block, number):
        tensor.copy_(weights[name])
    for layer, names in block_linears(block, number, is_stacked(weights.names())):
        for index, name in enumerate(names):
            matrix = weights[f"{name}.weight"][rows_of(layer, names, index)]
            layer.load_dense(index, matrix.float())
