"""A sharded decoder equals the decoder on one rank: weights, outputs, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megalr.models.build import build_decoder
from megalr.models.decoder import Decoder
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.plan import Plan
from tests.models.stand_ins import kernels_on_the_cpu
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import CASES, mesh, sizes

TOKENS = (3, 10)


def _pair(name: str, tensor: int) -> tuple[Decoder, Decoder]:
    """The decoder on one rank and this rank's shard of it, biases that are not zero."""
    method, layout = CASES[name]
    whole = build_decoder(sizes(name), method, seed=4)
    part = build_decoder(sizes(name), method, seed=4, plan=Plan(mesh(tensor), layout))
    generator = torch.Generator().manual_seed(1)
    named = dict(part.named_parameters())
    for key, full in whole.named_parameters():
        # Values that a fresh model does not have: B = 0 would hide the gradients of A.
        if key.endswith((".bias", ".b")) and "attention_norm" not in key:
            with torch.no_grad():
                draw = 0.1 * torch.randn(full.shape, generator=generator)
                full.copy_(torch.where(full == 0, draw, full))
                _zero_padding(whole)
                named[key].copy_(_local(named[key], full))
        if key.endswith("norm.weight"):
            with torch.no_grad():
                full.mul_(1 + 0.3 * torch.randn(full.shape, generator=generator))
                named[key].copy_(_local(named[key], full))
    return whole, part


def _zero_padding(decoder: Decoder) -> None:
    for linear in (*decoder.groups(), *decoder.linears()):
        for index, (start, stop) in enumerate(linear.shape.row_ranges()):
            rows = slice(linear.used_rows(index).stop, stop)
            assert rows.start >= start
            for stack in (getattr(linear, "b", None), linear.bias):
                if stack is not None:
                    stack.detach()[rows] = 0


def _local(parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
    shard = shard_of(parameter)
    return full if shard is None else shard.take(full)


def _same_weights(name: str, tensor: int) -> None:
    method, layout = CASES[name]
    whole = build_decoder(sizes(name), method, seed=4)
    part = build_decoder(sizes(name), method, seed=4, plan=Plan(mesh(tensor), layout))
    sharded = 0
    for (key, full), (other, local) in zip(
        whole.named_parameters(), part.named_parameters(), strict=True
    ):
        assert key == other
        assert local.shape == _local(local, full).shape, key
        assert torch.equal(local, _local(local, full)), key
        sharded += local.numel() < full.numel()
    assert sharded >= 2 + 2 * sizes(name).num_layers
    missing = torch.stack([torch.tensor(sum(p.numel() for p in part.parameters() if shard_of(p)))])
    dist.all_reduce(missing, group=mesh(tensor).tensor_group)
    total = sum(
        torch.Size(shard.full_shape).numel() for p in part.parameters() if (shard := shard_of(p))
    )
    assert int(missing) == total  # the parts are disjoint and complete


def _same_function(
    name: str,
    tensor: int,
    kernels: bool = False,
    rtol: float = 1e-5,
    positions: torch.Tensor | None = None,
) -> None:
    whole, part = _pair(name, tensor)
    if kernels:
        part.use_kernels()
        for block in part.blocks():
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    ids = torch.randint(0, 101, TOKENS)
    labels = torch.randint(0, 101, TOKENS)
    labels[0, :4] = -100
    with torch.no_grad():
        expected = whole(ids, None, positions)
        torch.testing.assert_close(part(ids, None, positions), expected, rtol=rtol, atol=1e-5)
    loss = whole(ids, labels, positions) * 0.1
    loss.backward()
    sharded_loss = part(ids, labels, positions) * 0.1
    sharded_loss.backward()
    torch.testing.assert_close(sharded_loss, loss, rtol=rtol, atol=1e-5)
    named = dict(part.named_parameters())
    for key, full in whole.named_parameters():
        if full.grad is None:
            assert named[key].grad is None
            continue
        expected = _local(named[key], full.grad)
        torch.testing.assert_close(
            named[key].grad, expected, rtol=rtol, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def _same_blocks(name: str, tensor: int) -> None:
    """One block by itself: output and gradient of the input."""
    whole, part = _pair(name, tensor)
    torch.manual_seed(8)
    x, dy = torch.randn(2, 6, 48), torch.randn(2, 6, 48)
    one = x.clone().requires_grad_()
    expected = sum(whole.blocks()[0](one, None, None))
    expected.backward(dy)
    first, last = 0, 48
    if part.plan.sharded_residual:
        first = mesh(tensor).tensor_rank * 48 // tensor
        last = first + 48 // tensor
    mine = x[..., first:last].clone().requires_grad_()
    found = sum(part.blocks()[0](mine, None, None))
    found.backward(dy[..., first:last])
    torch.testing.assert_close(found, expected[..., first:last], rtol=1e-5, atol=1e-5)
    assert one.grad is not None
    torch.testing.assert_close(mine.grad, one.grad[..., first:last], rtol=1e-5, atol=1e-5)


def _replicated_are_identical(name: str, tensor: int) -> None:
    """Replicated weights get bitwise the same gradient on all ranks."""
    _, part = _pair(name, tensor)
    torch.manual_seed(9)
    ids = torch.randint(0, 101, TOKENS)
    (part(ids, ids) * 0.1).backward()
    for key, parameter in part.named_parameters():
        if shard_of(parameter) is None and parameter.grad is not None:
            first = parameter.grad.clone()
            dist.broadcast(
                first, dist.get_global_rank(mesh(tensor).tensor_group, 0), mesh(tensor).tensor_group
            )
            assert torch.equal(first, parameter.grad), key
        assert hasattr(parameter, "tensor_model_parallel") == (shard_of(parameter) is not None)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_weights_do_not_depend_on_the_number_of_ranks(name: str, tensor: int) -> None:
    run_distributed(_same_weights, tensor, name, tensor)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_one_rank(name: str, tensor: int) -> None:
    run_distributed(_same_function, tensor, name, tensor)
    run_distributed(_same_blocks, tensor, name, tensor)
    run_distributed(_replicated_are_identical, tensor, name, tensor)


def _same_documents(name: str, tensor: int) -> None:
    """Rows of several documents; one rank is compared with documents alone in tests/models."""
    rows = [[10], [1, 4, 5], [3, 3, 1, 3]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    _same_function(name, tensor, positions=positions.int())


@pytest.mark.parametrize("name", ["full_rank", "cola", "low_rank_bottleneck"])
def test_documents_of_a_row_equal_those_of_one_rank(name: str) -> None:
    run_distributed(_same_documents, 2, name, 2)


def _same_function_by_kernels(name: str, tensor: int) -> None:
    """The kernels' operators in compiled blocks, with stand-ins where there is no reference."""
    with kernels_on_the_cpu():
        _same_function(name, tensor, kernels=True, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "low_rank_bottleneck",
        "head_norms",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("full_rank", "low_rank", "full_norms_bottleneck")
        ),
    ],
)
def test_the_path_of_the_kernels_equals_plain_layers_of_one_rank(name: str) -> None:
    run_distributed(_same_function_by_kernels, 2, name, 2)


def _compiled_blocks_are_whole(tensor: int) -> None:
    """The collectives become part of the compiled blocks: no graph break, the same gradients."""
    for name in CASES:
        torch.compiler.reset()
        _compiled_block_is_whole(name, tensor)


def _compiled_block_is_whole(name: str, tensor: int) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    method, layout = CASES[name]
    part = build_decoder(sizes(name), method, seed=4, plan=Plan(mesh(tensor), layout))
    ids = torch.randint(0, 101, TOKENS)
    (part(ids, ids) * 0.1).backward()
    expected = {key: p.grad.clone() for key, p in part.named_parameters() if p.grad is not None}
    part.zero_grad()
    for block in part.blocks():
        block.compile(dynamic=False, backend="aot_eager")
    part.norm.compile(dynamic=False, backend="aot_eager")
    (part(ids, ids) * 0.1).backward()
    assert not counters["graph_break"], name
    found = {key: p.grad for key, p in part.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.long
def test_compiled_blocks_have_no_breaks_and_the_same_gradients() -> None:
    """torch 2.11: collectives in place gave zero gradients here (docs/dev/deepspeed-notes.md)."""
    run_distributed(_compiled_blocks_are_whole, 2, 2)
