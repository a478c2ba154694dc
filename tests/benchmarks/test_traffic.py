"""Messages and collectives: what decoders on two ranks send, and times worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from scaling.besides import (
    Balancing,
    Loader,
    balancing_at,
    checkpoint_seconds,
    loading_seconds,
    refactorize_seconds,
)
from torch.utils._python_dispatch import TorchDispatchMode

from megalr.errors import UserError
from megalr.estimate.cluster import Cluster, Members, all_reduce_seconds, gather_seconds, members
from megalr.estimate.tensors import plan_of
from megalr.estimate.traffic import block_messages, data_traffic, end_messages
from megalr.estimate.update_time import Gpu, Job, predict, update_work
from megalr.estimate.work import block_work, micro_batch_work, product
from megalr.models.flops import flops_per_token
from tests.models.settings import factorized, full_rank, low_rank, tiny
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import CASES
from tests.tensor_parallel.meshes import sizes as cut_sizes

TOKENS = (3, 10)
CLUSTER = Cluster(
    gpus_per_node=8,
    memory=1e12,
    inside=100.0,
    across=10.0,
    inside_latency=0.1,
    across_latency=1.0,
    file_system=50.0,
    writer=5.0,
)


def _sent() -> dict[str, list[tuple[str, int]]]:
    """(collective, bytes of the whole message) of forward and backward, by case."""
    from megalr.models.build import build_decoder
    from megalr.tensor_parallel.plan import Plan
    from tests.tensor_parallel.meshes import mesh

    decoders = {
        name: build_decoder(cut_sizes(name), method, 0, plan=Plan(mesh(2), layout))
        for name, (method, layout) in CASES.items()
    }
    found = {}
    ids = torch.arange(30).reshape(TOKENS)
    for name, decoder in decoders.items():
        with _Counting() as counting:
            decoder(ids, ids).backward()
        found[name] = counting.sent
    return found


class _Counting(TorchDispatchMode):
    """Notes the collectives that reach torch's operators, going back as well."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("_c10d_functional::")
        if name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            whole = max(out, args[0], key=torch.Tensor.numel)
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor")
            self.sent.append((kind, whole.numel() * whole.element_size()))
        return out


@pytest.fixture(scope="module")
def sent() -> dict[str, list[tuple[str, int]]]:
    """What rank 0 of two sends, by case."""
    return run_distributed(_sent, 2)[0]


@pytest.mark.parametrize("name", CASES)
def test_messages_are_those_that_a_decoder_sends(
    name: str, sent: dict[str, list[tuple[str, int]]]
) -> None:
    method, layout = CASES[name]
    sizes = cut_sizes(name)
    plan = plan_of(sizes, method, 2, layout)
    expected: Counter[tuple[str, int]] = Counter()
    blocks = [block_messages(sizes, method, plan, 4, layer) for layer in range(sizes.num_layers)]
    for messages in (*blocks, end_messages(sizes, plan, element=4)):
        for message in (*messages[0], *messages[1]):
            expected[(message.kind, int(message.size(30)))] += 1
    assert Counter(sent[name]) == expected


def test_numbers_a_token_of_both_layouts() -> None:
    sizes, r = tiny(num_heads=4, num_kv_heads=4), 8
    forward, backward = block_messages(sizes, low_rank(r), plan_of(sizes, low_rank(), 2, "auto"))
    assert [m.numbers for m in forward] == [r, r]  # o, down
    assert [m.numbers for m in backward] == [3 * r, 2 * r]  # q, k, v; gate, up
    plan = plan_of(sizes, low_rank(r), 2, "bottleneck")
    forward, backward = block_messages(sizes, low_rank(r), plan)
    assert sum(m.numbers for m in forward if m.element == 2) == 7 * r
    assert sum(m.numbers for m in backward) == 7 * r
    assert [m.numbers for m in forward if m.element == 4] == [1, 1]  # two norms, forward only


def test_collectives_by_hand() -> None:
    # 4 of 8 in a node: a ring sends 3 quarters of 400 bytes in 3 steps.
    assert gather_seconds(400, Members(4, 1), CLUSTER) == pytest.approx(300 / 100 + 0.3)
    assert all_reduce_seconds(400, Members(4, 1), CLUSTER) == pytest.approx(600 / 100 + 0.6)
    # 2 nodes of 8: inside twice 7/8, then an eighth over two nodes by a ring of two.
    inside = 2 * (700 / 100 + 0.7)
    ring = 2 * (1 / 2) * 100 / 10 + 2 * 1.0
    assert all_reduce_seconds(800, Members(8, 2), CLUSTER) == pytest.approx(inside + ring)
    # 64 nodes: the tree's 12 latencies instead of the ring's 126
    tree = 2 * 100 / 10 + 2 * 6 * 1.0
    assert all_reduce_seconds(800, Members(8, 64), CLUSTER) == pytest.approx(inside + tree)


def test_groups_on_nodes() -> None:
    assert members(CLUSTER, 4) == Members(4, 1)
    assert members(CLUSTER, 64) == Members(8, 8)
    assert members(CLUSTER, 64, stride=4) == Members(2, 32)
    assert members(CLUSTER, 16, stride=8) == Members(1, 16)
    with pytest.raises(UserError, match="12 ranks do not fill nodes of 8"):
        members(CLUSTER, 12)


@pytest.mark.parametrize("method", [full_rank(), low_rank(), factorized("cola")])
def test_flops_are_those_of_the_model(method: Any) -> None:
    from megalr.models.build import make_linear_of
    from megalr.models.decoder import Decoder

    # A sequence so short that attention is nothing, and no padding.
    sizes = tiny(intermediate_size=96, vocab_size=112, num_heads=4, num_kv_heads=2)
    with torch.device("meta"):
        decoder = Decoder(sizes, make_linear_of(method, 0))
    forward, backward = micro_batch_work(sizes, method, plan_of(sizes, method, 1, "auto"), 64, 1)
    attention = 3.5 * 2 * sizes.num_layers * 4 * sizes.hidden_size  # speed halved, 2.5 backward
    model = flops_per_token(decoder, 1) - 3 * sizes.num_layers * 4 * sizes.hidden_size
    assert (forward + backward).flops / 64 == pytest.approx(model + attention)


def test_a_product_moves_its_operands_and_result() -> None:
    work = product((2, 3, 5), element=2)
    assert (work.flops, work.moved) == (60, 2 * (10 + 15 + 6))


def test_recomputation_repeats_the_blocks_forward() -> None:
    sizes, method = tiny(), low_rank()
    plan = plan_of(sizes, method, 1, "auto")
    plain = micro_batch_work(sizes, method, plan, 2, 24)[1]
    again = micro_batch_work(sizes, method, plan, 2, 24, recompute="full")[1]
    block = block_work(sizes, method, plan, 2, 24)[0]
    assert again.flops - plain.flops == pytest.approx(2 * block.flops)


def test_bytes_of_data_parallelism_by_stage() -> None:
    n = 1000
    assert data_traffic(0, n).reduced_once == 2 * n
    assert data_traffic(1, n).gathered_once == data_traffic(1, n).reduced_once == 2 * n
    assert data_traffic(2, n).reduced == 2 * n and data_traffic(2, n).reduced_once == 0
    stage3 = data_traffic(3, n, frozen=100)
    assert (stage3.scattered, stage3.fetched) == (2 * n, 2 * 2 * (n + 100))


def test_an_update_of_bf16_optimizer_in_passes_over_memory() -> None:
    sizes, method = tiny(), low_rank()
    job = Job(sizes, method, 2, 24, data_size=4)
    every, once = update_work(job)
    n = every.moved / 6  # bf16 read, float32 written over zeros
    # flatten, convert, copy back twice: 28; norm 4, zero 4; AdamW 28 and refresh 6 of a quarter
    assert once.moved == pytest.approx(n * (28 + 4 + 4) + n / 4 * (28 + 6))
    clipped = update_work(replace(job, clipping=True))[1]
    assert clipped.moved - once.moved == pytest.approx(8 * n / 4)
    alone = update_work(replace(job, data_size=1))[1]
    assert alone.moved == pytest.approx(n * (4 + 4) + n * (28 + 6))
    assert update_work(replace(job, accumulation=2))[0].moved == pytest.approx(12 * n)


def test_zero_2_communicates_in_every_micro_batch_and_hides_behind_backward() -> None:
    sizes, method, gpu = tiny(), low_rank(), Gpu(1e3, 1e3, 0.0)
    job = Job(sizes, method, 2, 24, accumulation=4, data_size=8, stage=2)
    slow, fast = CLUSTER, replace(CLUSTER, inside=1e15, inside_latency=0.0)
    once = predict(replace(job, stage=1), Gpu(1e30, 1e30, 0.0), slow).data
    unhidden = predict(job, Gpu(1e30, 1e30, 0.0), slow).data
    assert unhidden > 2.5 * once  # four all-reduces and a gather against one and one
    assert predict(job, gpu, fast).data == pytest.approx(0.0, abs=1e-6)


def test_refactorization_is_shared_out_and_never_below_one_matrix() -> None:
    measured = [Balancing(8, 1e-2, 1e-2), Balancing(32, 1e-1, 1e-1)]
    job = Job(tiny(), low_rank(8), 2, 24)
    fast = replace(CLUSTER, inside=1e15, inside_latency=0.0, across=1e15, across_latency=0.0)
    assert refactorize_seconds(job, fast, measured) == pytest.approx(14 * 1e-2)
    assert refactorize_seconds(replace(job, data_size=2), fast, measured) == pytest.approx(7e-2)
    assert refactorize_seconds(replace(job, data_size=64), fast, measured) == pytest.approx(1e-2)
    assert refactorize_seconds(Job(tiny(), full_rank(), 2, 24), fast, measured) == 0
    assert balancing_at(16, measured).alone == pytest.approx(10**-1.5)  # halfway, in logarithms


def test_checkpoints_are_bound_by_the_writer_or_the_file_system() -> None:
    job = Job(tiny(), low_rank(8), 2, 24)
    n = update_work(job)[0].moved / 6
    assert checkpoint_seconds(job, CLUSTER) == pytest.approx((2 * n + 12 * n) / 5)
    shared = replace(job, data_size=64)
    assert checkpoint_seconds(shared, CLUSTER) == pytest.approx(2 * n / 5 + 12 * n / 50)


def test_every_rank_orders_the_whole_batch_and_reads_its_share() -> None:
    job = Job(tiny(), low_rank(8), 2, 24, accumulation=3, data_size=4)
    assert loading_seconds(job, Loader(100.0, 1000.0)) == pytest.approx(24 / 100 + 6 * 24 / 1000)
