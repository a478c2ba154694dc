"""A decoder drawn piece by piece has the bits of one drawn whole, and less memory on the way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megalr.estimate.tensors import drawing_bytes, stored_tensors
from megalr.models.build import build_decoder
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.drawing import draw_piece, hold, pieces
from megalr.tensor_parallel.mesh import Mesh
from megalr.tensor_parallel.plan import SINGLE, Plan
from tests.live_bytes import LiveBytes
from tests.models.settings import GPT2, factorized, full_rank, low_rank, mixed, tiny

METHODS: dict[str, SimpleNamespace] = {
    "full_rank": full_rank(),
    "low_rank": low_rank(),
    "full_rank_variance": low_rank(init="full_rank_variance"),
    "low_rank of the MLP only": low_rank(targets=["gate", "up", "down"]),
    "low_rank of mixed ranks": mixed(low_rank()),
    **{name: factorized(name) for name in ("loro", "sltrain", "lora", "relora", "cola")},
}
SIZES = {
    "llama": tiny(),
    "tied": tiny(tie_embeddings=True, attention_bias=True),
    "gpt2": tiny(**GPT2),
}


def _state(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in decoder.state_dict().items()}


def _assert_same_bits(found: Decoder, expected: Decoder) -> None:
    left, right = _state(found), _state(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "plan", [SINGLE, Plan(Mesh(2, 1), "column_row")], ids=["alone", "one of 2"]
)
def test_weights_have_the_bits_of_a_model_drawn_whole_and_rounded(
    sizes: DecoderConfig, method: SimpleNamespace, plan: Plan
) -> None:
    whole = build_decoder(sizes, method, 3, plan=plan).bfloat16()
    _assert_same_bits(build_decoder(sizes, method, 3, plan=plan, dtype=torch.bfloat16), whole)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "name", ["full_rank", "sltrain", "low_rank of mixed ranks", "lora", "cola"]
)
def test_an_empty_decoder_is_filled_piece_by_piece(sizes: DecoderConfig, name: str) -> None:
    method, dtype = METHODS[name], torch.bfloat16
    decoder = build_decoder(sizes, method, 3, dtype=dtype, empty=True)
    parameters = list(decoder.parameters())
    assert all(p.untyped_storage().nbytes() == 0 for p in parameters if p.dim() > 1)
    marks = [getattr(p, "row_blocks", None) for p in parameters]
    for piece in pieces(decoder):
        hold(piece)
        draw_piece(decoder, piece, 3)
    assert [id(p) for p in decoder.parameters()] == [id(p) for p in parameters]
    assert [getattr(p, "row_blocks", None) for p in decoder.parameters()] == marks
    assert {id(p) for piece in pieces(decoder) for p in piece.parameters()} == {
        id(p) for p in parameters
    }
    _assert_same_bits(decoder, build_decoder(sizes, method, 3, dtype=dtype))


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sltrain"])
@pytest.mark.parametrize(
    "plan", [SINGLE, Plan(Mesh(2, 1), "column_row")], ids=["alone", "one of 2"]
)
def test_drawing_needs_one_matrix_in_float32_beside_the_weights(name: str, plan: Plan) -> None:
    sizes = tiny(hidden_size=96, intermediate_size=200, num_layers=4, pad_multiple=8)
    with LiveBytes() as live:
        decoder = build_decoder(sizes, METHODS[name], 3, plan=plan, dtype=torch.bfloat16)
    tensors = stored_tensors(sizes, METHODS[name], plan)
    weights = sum(2 * t.numel * t.times(4) for t in tensors)
    assert weights == _bytes(decoder)
    estimate = weights + max(drawing_bytes(sizes, METHODS[name], plan).values())
    assert 0.97 * estimate < live.peak <= estimate
    assert estimate < 2 * weights  # the whole model in float32
