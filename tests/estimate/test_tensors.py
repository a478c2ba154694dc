"""Sizes worked out from the configuration are those of the decoder's own tensors."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.errors import UserError
from megalr.estimate.tensors import TRAINED, Layout, count, stored_tensors
from megalr.models.build import make_linear_of
from megalr.models.config import PRESETS
from megalr.models.decoder import Decoder
from megalr.optim.groups import parameter_groups
from tests.models.settings import factorized, full_rank, low_rank, tiny

METHODS: dict[str, Any] = {
    "full_rank": full_rank(),
    "low_rank": low_rank(),
    "low_rank of the MLP only": low_rank(targets=["gate", "up", "down"]),
    "sltrain": factorized("sltrain"),
    "lora": factorized("lora"),
    "cola": factorized("cola"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "attention_bias": True}])
def test_every_tensor_of_the_decoder_is_counted(name: str, changes: dict) -> None:
    sizes, method = tiny(**changes), METHODS[name]
    with torch.device("meta"):
        decoder = Decoder(sizes, make_linear_of(method, 0))
    expected = Counter(p.numel() for p in decoder.parameters())
    expected.update(b.numel() for b in decoder.buffers())
    tensors = stored_tensors(sizes, method)
    found: Counter[int] = Counter()
    for tensor in tensors:
        found[tensor.numel] += sizes.num_layers if tensor.block else 1
    assert found == expected
    groups = parameter_groups(decoder, decoder.factor_parameters(), 0.1)
    for group in groups:
        # Dense targets have a group of their own for some optimizers only.
        kinds = ("matrices", "targets") if group["name"] == "matrices" else (group["name"],)
        assert count(tensors, sizes.num_layers, *kinds) == sum(p.numel() for p in group["params"])


def test_cut_tensors_by_hand() -> None:
    # h 8, f 16, vocabulary 32, one layer, r 2, 2 ranks
    sizes = tiny(
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        vocab_size=32,
    )
    dense = 2 * 32 * 8 // 2  # embedding and head, cut by rows
    norms = 3 * 8
    whole = 3 * 2 * 8 + 8 * 2 + 2 * 2 * 8 + 8 * 2  # A of qkv, B of o, A of gate and up, B of down
    cut = 24 * 2 + 2 * 8 + 32 * 2 + 2 * 16  # B of qkv, A of o, B of gate and up, A of down
    layout = Layout(2, "column_row")
    tensors = stored_tensors(sizes, low_rank(2), layout)
    assert count(tensors, 1, *TRAINED) == dense + norms + whole + cut // 2
    tensors = stored_tensors(sizes, low_rank(2), Layout(2, "bottleneck"))
    assert count(tensors, 1, *TRAINED) == dense + norms // 2 + (whole + cut) // 2
    tensors = stored_tensors(sizes, full_rank(), layout)
    assert count(tensors, 1, *TRAINED) == dense + norms + (4 * 64 + 3 * 128) // 2


@pytest.mark.parametrize(
    "method, layout, message",
    [
        (full_rank(), Layout(3), "3 ranks does not divide the 32 key/value heads"),
        (full_rank(), Layout(0), "0 ranks: use 1 or more"),
        (full_rank(), Layout(2, "bottleneck"), "nothing but factors"),
        (low_rank(), Layout(2, "rows"), "layout 'rows' is unknown"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    method: SimpleNamespace, layout: Layout, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stored_tensors(PRESETS["llama_1b"], method, layout)
