"""A window of several documents gives the loss and gradients of its documents alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

import megalr.kernels.document_mask
import megalr.models.decoder
from megalr.engine.build import compile_blocks
from megalr.engine.cuda_graph import MicroBatchGraph
from megalr.hf.names import dense_state_dict, load_dense_state_dict
from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from megalr.models.recompute import LEVELS
from tests.models.settings import full_rank, low_rank, tiny
from tests.models.stand_ins import kernels_on_the_cpu
from tests.models.test_decoder_equals_transformers import FAMILIES, reference_model

LENGTHS = [[17], [1, 9, 7], [5, 5, 1, 1, 5], [1] * 17, [16, 1]]
"""Tokens of the documents of each row."""

GPT2 = {
    "num_kv_heads": None,
    "norm": "layernorm",
    "positions": "learned",
    "max_positions": 17,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "attention_bias": True,
    "output_bias": True,
    "tie_embeddings": True,
}
FEATURES: dict[str, dict[str, Any]] = {
    "norms of heads": {"qk_norm": "head", "head_dim": 12},
    "no positions in a layer": {"rope_layers": (True, False)},
    "a window in a layer": {"sliding_window": 5, "window_layers": (True, False)},
}
SIZES = {**{name: changes for name, (changes, _, _) in FAMILIES.items()}, "gpt2": GPT2}


def window(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and positions of LENGTHS; the last token of a document has no label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocab_size, (len(LENGTHS), 17), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS]).int()
    labels = ids.roll(-1, 1)
    labels[:, :-1][positions[:, 1:] == 0] = -100
    labels[:, -1] = -100
    return ids, labels, positions


def results(decoder: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and the gradients of its mean per target."""
    decoder.zero_grad(set_to_none=True)
    (loss * 0.02).backward()
    grads = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def one_by_one(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The sum over the documents of :func:`window`, each a batch of its own."""
    ids, _, _ = window(decoder.config.vocab_size)
    losses = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        for document in row.split(lengths):
            labels = torch.cat((document[1:], torch.tensor([-100])))
            losses.append(decoder(document[None], labels[None]))
    return results(decoder, torch.stack(losses).sum())


def packed(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The same in one batch."""
    return results(decoder, decoder(*window(decoder.config.vocab_size)))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@contextlib.contextmanager
def flex_on_the_cpu(decoder: Decoder) -> Iterator[None]:
    """FlexAttention, backward too, which torch has there as plain products of whole matrices."""
    decoder.flex = True
    with (
        mock.patch.object(megalr.models.decoder, "flex_applies", lambda *_: True),
        mock.patch.object(
            megalr.kernels.document_mask, "_compiled", lambda: flex_module.flex_attention
        ),
        mock.patch.object(flex_module, "_validate_device", lambda *_: None),
    ):
        yield


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("method", [full_rank(), low_rank()], ids=lambda m: m.name)
def test_a_window_equals_its_documents_alone(family: str, method: Any) -> None:
    decoder = build_decoder(tiny(**SIZES[family]), method, seed=3)
    assert_same(packed(decoder), one_by_one(decoder))


def test_without_positions_it_does_not() -> None:
    decoder = build_decoder(tiny(), low_rank(), seed=3)
    ids, labels, _ = window(101)
    expected = one_by_one(decoder)["loss"]
    assert (decoder(ids, labels) - expected).abs() > 0.1
    one_document = torch.arange(17, dtype=torch.int32).expand(ids.shape)
    torch.testing.assert_close(decoder(ids, labels, one_document), decoder(ids, labels))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_recomputation_changes_nothing(level: str) -> None:
    plain = build_decoder(tiny(), low_rank(), seed=3)
    decoder = build_decoder(tiny(), low_rank(), seed=3, recompute=level)
    assert_same(packed(decoder), packed(plain))


@pytest.mark.parametrize("level", ["none", "bottleneck"])
def test_compiled_blocks_are_compiled_once(level: str) -> None:
    """No recompilation for other documents, with and without FlexAttention's mask as input."""
    ids, labels, positions = window(101)
    others = torch.zeros_like(positions)
    for flex in (False, True):
        torch.compiler.reset()
        expected = one_by_one(build_decoder(tiny(), low_rank(), seed=3))
        decoder = build_decoder(tiny(), low_rank(), seed=3, recompute=level)
        for block in decoder.blocks():
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
        with flex_on_the_cpu(decoder) if flex else contextlib.nullcontext():
            assert_same(packed(decoder), expected)
            with torch.compiler.set_stance("fail_on_recompile"):
                results(decoder, decoder(ids, labels, others))
                assert_same(packed(decoder), expected)


@pytest.mark.parametrize("family", SIZES)
def test_flex_attention_gives_the_same(family: str) -> None:
    decoder = build_decoder(tiny(**SIZES[family]), low_rank(), seed=3)
    expected = one_by_one(decoder)
    with flex_on_the_cpu(decoder):
        assert_same(packed(decoder), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers_with_positions_and_a_mask(family: str) -> None:
    changes, kind, extra = FAMILIES[family]
    config = tiny(**changes)
    reference = reference_model(config, kind, extra)
    decoder = build_decoder(config, full_rank(), seed=0)
    load_dense_state_dict(decoder, reference.state_dict())
    ids, labels, positions = window(config.vocab_size)
    mask: Any = _blocks(config.sliding_window)
    if config.window_layers is not None:  # transformers' masks by kind of layer
        mask = {"full_attention": _blocks(None), "sliding_attention": mask}
    logits = reference(ids, position_ids=positions.long(), attention_mask=mask).logits
    torch.testing.assert_close(decoder(ids, None, positions), logits, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    (loss * 0.02).backward()
    found = packed(decoder)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-5)
    gradients = build_decoder(config, full_rank(), seed=0)
    for name, target in gradients.named_parameters():
        target.data.copy_(found[name])
    ours = dense_state_dict(gradients)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def _blocks(sliding: int | None) -> torch.Tensor:
    """The mask that transformers takes, written out: 0 where a token may look, -inf elsewhere."""
    mask = torch.full((len(LENGTHS), 1, 17, 17), -torch.inf)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            for query in range(start, start + length):
                first = start if sliding is None else max(start, query - sliding + 1)
                mask[row, 0, query, first : query + 1] = 0
            start += length
    return mask


@pytest.mark.parametrize("case", ["low_rank", "grouped", "full_rank", "window", *FEATURES])
def test_the_path_of_the_kernels_gives_the_same(case: str) -> None:
    """With PyTorch stand-ins for them, in compiled blocks."""
    changes = {
        "grouped": {"num_heads": 4, "num_kv_heads": 2},
        "window": {"sliding_window": 5},
        **FEATURES,
    }
    method = full_rank() if case == "full_rank" else low_rank()
    decoder = build_decoder(tiny(**changes.get(case, {})), method, seed=3)
    expected = one_by_one(decoder)
    with kernels_on_the_cpu() as seen:
        decoder.use_kernels()
        for block in decoder.blocks():
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
        found = packed(decoder)
        assert len(seen) == decoder.config.num_layers
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("S", [256, 640, 1000])
def test_a_cuda_graph_replays_other_documents(S: int, compiled: bool) -> None:
    """bf16 by the kernels (256) or FlexAttention, against float32 by plain attention.

    All gradients together may be off by half as much again as those of plain attention in bf16 on
    the CPU, each by twice as much: rounding alone takes one to 1.4 times, in 12 draws on a CPU.
    """
    sizes = tiny(hidden_size=128, num_heads=4, num_kv_heads=2, intermediate_size=192)
    fast = build_decoder(sizes, low_rank(), seed=3).cuda().bfloat16()
    exact = build_decoder(sizes, low_rank(), seed=3).cuda()
    exact.load_state_dict(fast.state_dict())
    rough = build_decoder(sizes, low_rank(), seed=3).bfloat16()
    fast.use_kernels()
    if compiled:
        compile_blocks(fast)
    generator = torch.Generator().manual_seed(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = MicroBatchGraph(fast, (2, S), share_gradients=False, document_mask=True)
        for share in (0.004, 0.1):
            place = torch.arange(S)
            starts = torch.rand(2, S, generator=generator) < share
            positions = place - torch.where(starts, place, 0).cummax(1).values
            ids = torch.randint(0, 101, (2, S), generator=generator)
            inputs = [ids.cuda(), ids.roll(-1, 1).cuda(), positions.int().cuda()]
            expected = results(exact, exact(*inputs))
            rounded = results(rough, rough(*(x.cpu() for x in inputs)))
            fast.zero_grad(set_to_none=True)
            loss = graph(inputs, 0.02)
            loss.backward()
            torch.testing.assert_close(loss / 0.02, expected.pop("loss"), rtol=1e-3, atol=0)
            named = dict(fast.named_parameters())
            squares = torch.zeros(2, device="cuda")  # ours, those of plain attention
            for name, value in expected.items():
                both = torch.stack([named[name].grad.float(), rounded[name].float().cuda()])
                errors = (both - value).flatten(1).norm(dim=1) / value.norm()
                assert errors[0] < 2 * errors[1], f"{name}: {errors.tolist()}"
                squares += errors.square()
            assert squares[0].sqrt() < 1.5 * squares[1].sqrt(), squares.tolist()
