"""The optimizers inside DeepSpeed engines, on real processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.engine.state import attach_layouts
from megalr.engine.wrappers import BF16, Unfused, Unwrapped, ZeRO3, ZeRO12, wrapper_of
from megalr.errors import UserError
from megalr.optim import SCALE, SPAM, GaLore, StableSPAM
from megalr.sharding.exchange import assign_owners
from megalr.sharding.fragment import LogicalTensor, share_fragments, slice_fragments, within
from tests.optim import engines
from tests.ranks import run_distributed
from tests.restarts.engines import engine_of, make_decoder, train

ALL = tuple(engines.METHODS)


@pytest.mark.parametrize(
    "world,stages",
    [
        (2, (1,)),
        pytest.param(1, (0, 2), marks=pytest.mark.long),
        pytest.param(2, (0, 3), marks=pytest.mark.long),
        pytest.param(3, (2, 3), marks=pytest.mark.long),
    ],
)
def test_sharded_trajectories_equal_the_single_process_ones(world, stages):
    """20 updates, clipped, accumulated, with projector refreshes and resets on the way."""
    for distances in run_distributed(engines.trajectories, world, ALL, stages, 20, 0.7):
        assert len(distances) >= len(ALL) * (len(stages) - 1)
        assert {case: d for case, d in distances.items() if d > 1e-5} == {}


def test_a_rank_that_holds_nothing_but_padding_takes_part():
    """Slices of 4 elements for a tensor of 7: the third rank has none."""
    assert max(run_distributed(engines.stable_spam_on_slices, 3, 4, 7)) < 1e-6


@pytest.mark.parametrize("kind", ["matrices", "embedding", "head"])
def test_rows_that_slices_cut_are_normalized_as_whole_rows(kind):
    """Rows in two and in three slices, slices of padding, rows that end with a slice."""
    for size, shapes in (
        (7, [(4, 5)]),
        (3, [(1, 8)]),
        (11, [(3, 4), (2, 10)]),
        (9, [(2, 4), (1, 2)]),
    ):
        assert max(run_distributed(engines.scale_on_slices, 3, kind, size, shapes)) < 1e-14


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_from_an_engine_checkpoint_is_bitwise(stage):
    methods = ALL if stage == 2 else ("spam", "fira", "loro")
    for rank in run_distributed(engines.resume, 2, methods, (stage,)):
        assert [case for case, same in rank.items() if not same] == []


@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_state_is_divided_over_the_ranks(stage):
    r, others = 3, 10 * 16 + 28  # embedding and vector: two moments each
    shapes = [(20, 16), (8, 16), (16, 3), (12, 3), (3, 28), (3, 28)]
    low = sum(min(s) * r + 2 * max(s) * r for s in shapes)
    elements = {
        "galore": low + 2 * others,
        "fira": low + len(shapes) + 2 * others,
        "apollo": sum(2 * max(s) * r + 1 for s in shapes) + 2 * others,
        "stable_spam": 2 * sum(a * b for a, b in shapes) + 2 * others,
        "scale": 2 * 28,
        "scale_head": sum(a * b for a, b in shapes) + 2 * 28,
    }
    for method, total in elements.items():
        ranks = run_distributed(engines.state_elements, 2, method, stage)
        scalars = 2 * 3 * 8 if method == "stable_spam" else 0  # three a tensor, on every rank
        padding = sum(p for _, p in ranks)
        assert sum(e for e, _ in ranks) == total + 2 * padding + scalars
        assert max(e for e, _ in ranks) < 0.75 * total


def test_no_rank_repeats_the_decomposition_of_another():
    for stage in (1, 3):
        calls = [c for rank in run_distributed(engines.decompositions, 3, stage) for c in rank]
        shapes = [(20, 16), (8, 16), (16, 3), (12, 3), (3, 28), (3, 28)]
        assert sorted(calls) == sorted(2 * shapes)  # each matrix once a refresh


@pytest.mark.parametrize("world", [1, 2])
def test_layouts_find_every_logical_tensor_in_every_kind_of_engine(world):
    for rank in run_distributed(engines.layouts_match, world, tuple(engines.ENGINES)):
        assert {name: d for name, (d, _) in rank.items() if d > 0} == {}
        assert all(moved > 0 for _, moved in rank.values())


def test_matrix_optimizers_are_refused_at_stage_0_on_several_ranks():
    for method in ("galore", "loro", "muon", "spectron"):
        for message in run_distributed(engines.refusal, 2, method):
            assert "zero_optimization.stage is 0 with several ranks, use stage 1 or more" in message


def test_tensor_parallelism_is_refused_where_whole_tensors_are_looked_at():
    mpu = SimpleNamespace(get_model_parallel_world_size=lambda: 2)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    module = torch.nn.Module()
    for optimizer in (
        GaLore([weight], rank=2),
        StableSPAM([weight]),
        SPAM([weight], density=0.5),
        SCALE([weight]),
    ):
        engine = SimpleNamespace(optimizer=optimizer, mpu=mpu, module=module)
        with pytest.raises(UserError, match="tensor parallelism over 2 ranks cuts them"):
            attach_layouts(engine)


def test_a_flat_slice_without_a_layout_is_never_taken_for_a_tensor():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = GaLore([weight], rank=2)
    flat = torch.nn.Parameter(weight.detach().flatten())
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.randn(24)
    with pytest.raises(RuntimeError, match="no layout for: call attach_layouts"):
        optimizer.step()


def test_fragments_cover_every_tensor_once_however_it_is_split():
    for world in (1, 2, 3, 5):
        for first, numel, size in ((0, 7, 4), (3, 20, 7), (12, 1, 13), (5, 30, 40)):
            slices = max(world, -(-(first + numel) // size))
            fragments = slice_fragments(numel, first, size, slices)
            covered = [f.start + i for f in fragments for i in range(f.numel)]
            assert covered == list(range(numel))
            assert all(f.rank * size + f.offset == first + f.start for f in fragments)
            assert all(f.offset >= 0 and f.offset + f.numel <= size for f in fragments)
        share = -(-30 // world)
        fragments = within(share_fragments(30, share, 100, world), 11, 13)
        assert [f.start + i for f in fragments for i in range(f.numel)] == list(range(13))
        assert all(f.offset >= 100 and f.offset + f.numel <= 100 + share for f in fragments)


def test_cut_matrices_are_owned_evenly_by_ranks_that_hold_much_of_them():
    tensors = [
        LogicalTensor(str(i), (64, 64), share_fragments(4096, 1024, 0, 4), number=i)
        for i in range(12)
    ]
    owned = assign_owners(tensors, 4)
    assert [sum(t.owner == rank for t in owned) for rank in range(4)] == [3, 3, 3, 3]
    lopsided = LogicalTensor("x", (10, 10), slice_fragments(100, 5, 20 * 5, 2))
    assert assign_owners([lopsided], 2)[0].owner == 0


ADAPTERS = {
    "fp32 stage 0": Unwrapped,
    "paper_bf16 stage 0": Unwrapped,
    "bf16 stage 0": Unfused,
    "bf16 stage 1": BF16,
    "paper_bf16 stage 1": ZeRO12,
    "fp32 stage 2 offload": ZeRO12,
    "bf16 stage 3": ZeRO3,
}


def _adapter(kind: str) -> None:
    """The adapter; its fragments against DeepSpeed's addresses; weights whole on every rank."""
    with engine_of(kind) as engine:
        wrapper = wrapper_of(engine)
        assert type(wrapper) is ADAPTERS[kind] and wrapper_of(engine) is wrapper
        expected = make_decoder().state_dict()
        groups = wrapper.groups()
        assert sum(len(group) for group in groups) == len(expected)
        for parameter in (p for group in groups for p in group):
            located = wrapper.fragment(parameter)
            mapping = getattr(parameter, "_hp_mapping", None)
            if isinstance(wrapper, BF16 | ZeRO12):
                assert (mapping is None) == (located is None)
                if located is not None:
                    flat, here = located
                    theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
                    assert [a.start for a in theirs] == [here.offset, here.start]
                    assert mapping.hp_fragment_address.numel == here.numel
                    assert mapping.hp_fragment.data_ptr() == here.of(flat).data_ptr()
            with wrapper.whole(parameter):
                assert parameter.shape == wrapper.shape(parameter)
                value = expected[wrapper.name(parameter)].to(parameter.dtype)
                assert torch.equal(parameter.detach(), value)
        train(engine, 0)
        norm, skipped = wrapper.step_result()
        # Without a wrapper the norm is megalr's own, which build_engine installs.
        assert not bool(skipped) and (float(norm) > 0 or isinstance(wrapper, Unwrapped))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_engine_has_its_adapter(kind: str) -> None:
    run_distributed(_adapter, 2, kind)


def test_an_unknown_wrapper_and_an_engine_without_optimizer_are_refused() -> None:
    for optimizer, message in ((object(), "wrapper object is not supported"), (None, "has none")):
        with pytest.raises(UserError, match=message):
            wrapper_of(SimpleNamespace(optimizer=optimizer))
