"""Estimated activations are those that autograd keeps of blocks, with and without our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import megalr.models.decoder
from megalr.config.schema import RunConfig
from megalr.estimate.activations import (
    LIBRARIES,
    ActivationBytes,
    Kernels,
    Shape,
    attention_backward_bytes,
    block_elements,
    head_bytes,
    kept_elements,
    kernels_of,
    mask_bytes,
)
from megalr.estimate.memory import estimate_memory
from megalr.estimate.tensors import matrix_groups, plan_of
from megalr.models.build import build_decoder, sizes_of
from megalr.tensor_parallel.plan import SINGLE, Plan
from tests.models.settings import ALL_TARGETS, GPT2, factorized, full_rank, low_rank, mixed, tiny
from tests.models.stand_ins import kernels_on_the_cpu
from tests.ranks import run_distributed
from tests.tensor_parallel.meshes import mesh
from tests.training.runs import zero

BATCH, LENGTH = 3, 16
SIZES = tiny(num_heads=4, num_kv_heads=2)
# Not compiled, RMSNorm keeps its input on GPUs, as LayerNorm does everywhere; on the CPU it is
# several operators, which keep float32 copies.
EAGER_SIZES = tiny(num_heads=4, num_kv_heads=2, norm="layernorm")
NOT_DOWN = [target for target in ALL_TARGETS if target != "down"]
SAME_IN_ALL = {"q": 4, "mlp.gate": 12, "down": 6}
METHODS = {
    "low_rank": low_rank(),
    "low_rank, down dense": low_rank(targets=NOT_DOWN),
    "full_rank": full_rank(),
    "cola": factorized("cola"),
    "sltrain": factorized("sltrain"),
    "lora": factorized("lora"),
    "low_rank, mixed": mixed(low_rank(), ranks=SAME_IN_ALL),
    "sltrain, mixed": mixed(factorized("sltrain"), ranks=SAME_IN_ALL),
    "sltrain, v apart": mixed(factorized("sltrain"), ranks={"v": 4}),
    "cola, mixed": mixed(factorized("cola"), ranks=SAME_IN_ALL),
    "lora, down dense": SimpleNamespace(**{**vars(factorized("lora")), "targets": NOT_DOWN}),
}


def _grouped_heads_are_flash() -> bool:
    """Whether sdpa on this CPU keeps q, k, v in bf16, as on GPUs; torch 2.6 makes float32 copies of
    heads in groups."""
    q, kv = (torch.randn(1, n, 4, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2))
    y = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)
    return "Flash" in y.grad_fn.name()  # type: ignore[union-attr]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with kernels_on_the_cpu():
        yield


FEATURES: dict[str, dict[str, Any]] = {
    "wide heads": {"head_dim": 20},
    "norms of heads": {"qk_norm": "head", "head_dim": 20},
    "norms over all heads, post": {"qk_norm": "full", "norm_order": "post"},
    "no positions": {"rope_layers": (False,)},
    "norms of heads, no positions": {"qk_norm": "head", "rope_layers": (False,)},
    "partly rotated": {"partial_rotary_factor": 0.5},
    "gpt2": {**GPT2, "num_kv_heads": 2, "intermediate_size": 83},
}


def _kept_numbers(
    method: Any,
    kernels: bool,
    compiled: bool,
    level: str = "none",
    plan: Plan = SINGLE,
    **features: Any,
) -> float:
    """Numbers a token and block that are saved for backward, weights aside; of float32 two each.

    Without sharded norms only bf16 is counted: the rest is a number a token and head.
    """
    sizes = replace(SIZES if compiled or plan.sharded_residual else EAGER_SIZES, **features)
    decoder = build_decoder(sizes, method, seed=3, recompute=level, plan=plan).bfloat16()
    if kernels:
        decoder.use_kernels()
    sharded_norms = plan.parallel and sizes.qk_norm == "full"
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_tokens = tensor.numel() > BATCH * LENGTH and tensor.dtype == torch.bfloat16
        if tensor.dtype == torch.float32 and (plan.sharded_residual or sharded_norms):
            of_tokens = tensor.shape[:-1] == (BATCH, LENGTH) and tensor.shape[-1] > 1
        if of_tokens and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    width = SIZES.hidden_size // (plan.mesh.tensor_size if plan.sharded_residual else 1)
    x = torch.randn(BATCH, LENGTH, width, requires_grad=True, dtype=torch.bfloat16)
    rope = torch.ones(2, LENGTH, sizes.rotary_width) if sizes.rotates(0) else None
    alive = [(x, torch.zeros_like(x))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in decoder.blocks():
            if compiled:
                block.compile(dynamic=False, backend="aot_eager_decomp_partition")
            x, added = alive[-1]
            alive.append(block(x, rope, None, added))
    return sum(kept.values()) / (2 * BATCH * LENGTH * SIZES.num_layers)


def _estimated(
    method: Any, kernels: bool, compiled: bool, level: str = "none", **features: Any
) -> float:
    settings = {"precision": "bf16", "kernels": "auto" if kernels else "torch"}
    config: Any = SimpleNamespace(
        train=SimpleNamespace(**settings),
        data=SimpleNamespace(sequence_length=256, document_mask=False),
        method=method,
    )
    # The heads of the tiny model are narrower than the kernels want; the operators do not mind.
    wide = tiny(hidden_size=256, num_heads=4, num_kv_heads=2)
    wide = replace(wide, **{**features, "head_dim": None})
    used = kernels_of(config, wide, SINGLE, True)
    shape = Shape(BATCH * LENGTH, 2, compiled, level, used)
    sizes = replace(SIZES, **features)
    arguments = (sizes, method, SINGLE, matrix_groups(sizes, method, SINGLE), shape)
    if level == "none":
        return block_elements(*arguments, sizes.rotates(0))
    return kept_elements(*arguments)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("on_cpu")
def test_a_block_not_compiled_keeps_what_is_estimated(name: str, kernels: bool) -> None:
    if not kernels and not _grouped_heads_are_flash():
        pytest.skip("sdpa on the CPU keeps float32 with this torch")
    found = _kept_numbers(METHODS[name], kernels, compiled=False)
    assert found == _estimated(METHODS[name], kernels, compiled=False)


@pytest.mark.parametrize(
    ("name", "kernels", "level"),
    [
        ("low_rank", True, "none"),
        ("full_rank", False, "none"),
        ("full_rank", True, "none"),
        ("sltrain", True, "none"),
        ("cola", True, "none"),
        ("low_rank, mixed", True, "none"),
        ("sltrain, mixed", True, "none"),
        ("low_rank, mixed", True, "elementwise"),
        ("low_rank, mixed", True, "bottleneck"),
        ("full_rank", True, "elementwise"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_block_keeps_what_is_estimated(name: str, kernels: bool, level: str) -> None:
    if not kernels and not _grouped_heads_are_flash():
        pytest.skip("sdpa on the CPU keeps float32 with this torch")
    found = _kept_numbers(METHODS[name], kernels, compiled=True, level=level)
    assert found == _estimated(METHODS[name], kernels, compiled=True, level=level)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("name", "level"),
    [
        *(("low_rank", level) for level in ("none", "elementwise", "mlp")),
        *(("full_rank", level) for level in ("none", "elementwise")),
    ],
)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.usefixtures("on_cpu")
def test_a_block_of_another_family_keeps_what_is_estimated(
    features: str, name: str, kernels: bool, level: str
) -> None:
    if not kernels and not _grouped_heads_are_flash():
        pytest.skip("sdpa on the CPU keeps float32 with this torch")
    case: Any = (METHODS[name], kernels, True, level)
    torch._dynamo.reset()
    assert _kept_numbers(*case, **FEATURES[features]) == _estimated(*case, **FEATURES[features])


LAYOUTS = {
    "dense": (full_rank(), "column_row"),
    "column_row": (low_rank(), "column_row"),
    "bottleneck": (low_rank(), "bottleneck"),
    "cola, bottleneck": (factorized("cola"), "bottleneck"),
    "post, dense": (full_rank(), "column_row"),
    "post, column_row": (low_rank(), "column_row"),
    "post, bottleneck": (low_rank(), "bottleneck"),
}
OLMO2 = FEATURES["norms over all heads, post"]


def _kept_under_tensor_parallelism(cases: list[tuple[str, bool, bool]]) -> list[float]:
    """What one of two ranks keeps, by (layout, our SwiGLU, compiled)."""
    found = []
    for name, swiglu, compiled in cases:
        method, layout = LAYOUTS[name]
        torch._dynamo.reset()
        with mock.patch.object(megalr.models.decoder, "half_on_gpu", lambda _: True):
            features = OLMO2 if "post" in name else {}
            plan = Plan(mesh(2), layout)
            found.append(_kept_numbers(method, swiglu, compiled, plan=plan, **features))
    return found


@pytest.mark.long
def test_what_a_block_keeps_under_tensor_parallelism() -> None:
    if not _grouped_heads_are_flash():
        pytest.skip("sdpa on the CPU keeps float32 with this torch")
    cases = [(name, swiglu, True) for name in LAYOUTS for swiglu in (False, True)]
    cases += [(name, True, False) for name in LAYOUTS]
    found = run_distributed(_kept_under_tensor_parallelism, 2, cases)[0]
    expected = []
    for name, swiglu, compiled in cases:
        method, layout = LAYOUTS[name]
        sizes = replace(SIZES, **OLMO2) if "post" in name else SIZES
        plan = plan_of(sizes, method, 2, layout)
        shape = Shape(BATCH * LENGTH, 2, compiled, "none", Kernels(swiglu=swiglu))
        groups = matrix_groups(sizes, method, plan)
        expected.append(block_elements(sizes, method, plan, groups, shape))
    assert dict(zip(cases, found, strict=True)) == dict(zip(cases, expected, strict=True))


def _run(method: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A run of llama_350m."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "model": {"preset": "llama_350m"},
        "optimizer": {"lr": 1e-3},
        "data": {"train": "unused", "sequence_length": 256},
        "train": {"updates": 1, "global_batch_size": 8, "micro_batch_size": 8},
        "method": method,
    }
    return RunConfig.model_validate(
        {
            name: {**values.get(name, {}), **sections.get(name, {})}
            for name in {**values, **sections}
        }
    )


LOW_RANK = {"name": "low_rank", "rank": 256, "alpha": 256.0}
FULL_RANK = {"name": "full_rank"}
ALL = Kernels(attention=True, swiglu=True, loss=True)
FLEX = Kernels(swiglu=True, loss=True, flex=True)
MASKS = {"document_mask": True}
MLP = {"activation_checkpointing": "mlp"}
COMPILED = {**MLP, "compile": True}


@pytest.mark.parametrize(
    ("run", "hopper", "expected"),
    [
        (_run(LOW_RANK), True, ALL),
        (_run(FULL_RANK), True, ALL),
        (_run(LOW_RANK, train={"kernels": "torch"}), True, Kernels()),
        (_run(LOW_RANK), False, Kernels(swiglu=True, loss=True)),
        (_run(LOW_RANK, train={"precision": "fp32"}), True, Kernels(loss=True)),
        (_run(LOW_RANK, data={"sequence_length": 1024}), True, Kernels(False, True, True)),
        (_run(LOW_RANK, model={"sliding_window": 128}), True, Kernels(False, True, True)),
        (_run({"name": "lora", "rank": 8, "alpha": 8.0}), True, Kernels(True, False, True)),
        (_run(LOW_RANK, data=MASKS, model={"sliding_window": 128}), True, ALL),
        (_run(LOW_RANK, data=MASKS), False, FLEX),
        (_run(LOW_RANK, data=MASKS, train=MLP), False, Kernels(False, True, True)),
        (_run(LOW_RANK, data=MASKS, train=COMPILED), False, FLEX),
        (_run(LOW_RANK, data={**MASKS, "sequence_length": 1024}), True, FLEX),
        (_run(LOW_RANK, parallel={"tensor": 2}), True, Kernels(True, True, False)),
    ],
)
def test_which_kernels_a_run_uses(run: RunConfig, hopper: bool, expected: Kernels) -> None:
    sizes = sizes_of(run)
    plan = plan_of(sizes, run.method, run.parallel.tensor, run.parallel.layout)
    assert kernels_of(run, sizes, plan, hopper) == expected


def test_the_loss_kernel_makes_no_float32_logits() -> None:
    sizes = sizes_of(_run(FULL_RANK))
    plain, fused = (Shape(2048, 2, False, "none", Kernels(loss=loss)) for loss in (False, True))
    logits = 2048 * sizes.padded_vocab_size
    assert head_bytes(sizes, SINGLE, plain) - head_bytes(sizes, SINGLE, fused) == 16 * logits


def test_bytes_by_hand() -> None:
    """llama_350m, 2048 tokens: h 1024, f 2752 (2736 padded), 24 layers, 16 heads."""
    found = estimate_memory(_run(FULL_RANK, train={"compile": True}), zero(1), "x", 1).activations
    assert found.kept == 24 * 2048 * (2 * (8 * 1024 + 2 * 2752) + 4 * (16 + 2))
    a100 = estimate_memory(_run(FULL_RANK), zero(1), "x", 1, hopper=False).activations
    assert a100.kept - found.kept == 24 * 2048 * 2 * (2 * 1024)  # v keeps the stack alive


ONE_B = {"preset": "llama_1b"}
LONG = {"compile": True, "global_batch_size": 1, "micro_batch_size": 1}


def _activations(method: dict[str, Any], length: int, **train: Any) -> ActivationBytes:
    """Of llama_1b with one sequence: h 2048, f 5504 (5461 padded), 24 layers, 32 heads."""
    run = _run(method, model=ONE_B, data={"sequence_length": length}, train={**LONG, **train})
    return estimate_memory(run, zero(1), "x", 1).activations


@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384, 32768])
def test_bytes_of_long_sequences_by_hand(length: int) -> None:
    """Torch's attention: dense layers keep the stack that v is a part of; r = 256 here."""
    h, f = 2048, 5504
    numbers = {"none": 10 * h + 2 * f, "elementwise": 6 * h + 2 * f, "full": h}
    scales = {"none": 4 * (32 + 2), "elementwise": 4 * 32, "full": 0}
    found = {
        level: _activations(FULL_RANK, length, activation_checkpointing=level) for level in numbers
    }
    for level, activations in found.items():
        assert activations.kept == 24 * length * (2 * numbers[level] + scales[level]), level
    # In one block; what elementwise keeps of q, k and v (3 h) is not recomputed.
    assert found["full"].again == length * (2 * (9 * h + 2 * f) + scales["none"])
    low = _activations(LOW_RANK, length).kept
    assert low == 24 * length * (2 * (8 * h + 7 * 256 + 2 * f) + scales["none"])
    # Chunks of logits of at most 512 MiB, and the weight's gradients and their sum.
    tokens = min(length, 8192)
    logits, weight = 2 * 32000 * tokens, 32000 * h
    sums = {2048: 2, 4096: 2, 8192: 2, 16384: 4, 32768: 6}[length]
    head = logits + weight * sums + 3 * length * h * 2
    block = length * (3 * f + 2 * h) * 2
    assert found["none"].work - LIBRARIES == max(head, block)


@pytest.mark.parametrize("level", ["none", "elementwise", "full"])
def test_the_peak_grows_with_the_length(level: str) -> None:
    """Of one sequence; with as many tokens a micro-batch the length does not count."""
    peaks = []
    for length in (2048, 4096, 8192, 16384, 32768):
        train = {**LONG, "activation_checkpointing": level}
        run = _run(LOW_RANK, model=ONE_B, data={"sequence_length": length}, train=train)
        peaks.append(estimate_memory(run, zero(1), "x", 1).peak)
    assert peaks == sorted(set(peaks))
    batches = {2048: 16, 8192: 4, 32768: 1}
    same = set()
    for length, rows in batches.items():
        train = {"compile": True, "global_batch_size": rows, "micro_batch_size": rows}
        run = _run(
            LOW_RANK,
            model=ONE_B,
            data={"sequence_length": length},
            train={**train, "activation_checkpointing": level},
        )
        same.add(estimate_memory(run, zero(1), "x", 1).peak)
    assert same == {peaks[-1]}


def test_attention_of_torch_sums_dq_in_float32() -> None:
    """Per token: gradients of residual, norm, o, q, k, v in bf16; dq and a number a head."""
    sizes = sizes_of(_run(FULL_RANK))  # h 1024, 16 heads
    grouped = replace(sizes, num_kv_heads=4)
    plain, fused = (Shape(1, 2, True, "none", Kernels(attention=own)) for own in (False, True))
    assert attention_backward_bytes(sizes, SINGLE, fused) == 2 * 6 * 1024
    assert attention_backward_bytes(sizes, SINGLE, plain) == 2 * 6 * 1024 + 4 * (1024 + 16)
    expected = 2 * (4 * 1024 + 2 * 256 + 2 * 1024) + 4 * (1024 + 16)
    assert attention_backward_bytes(grouped, SINGLE, plain) == expected


def test_bytes_of_document_masks_are_those_that_autograd_keeps() -> None:
    """Plain attention on the CPU: the mask once, a copy in bf16 in each block, tables of rows."""
    decoder = build_decoder(EAGER_SIZES, low_rank(), seed=3).bfloat16()
    labels = torch.randint(0, 101, (BATCH, LENGTH))
    positions = (torch.arange(LENGTH) % 7).int().expand(BATCH, LENGTH)
    kept: list[dict[int, tuple[Any, int]]] = []
    for inputs in ((labels, labels), (labels, labels, positions)):
        kept.append({})

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[-1][storage.data_ptr()] = (tensor, storage.nbytes())  # alive: no address is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = decoder(*inputs)
        assert torch.isfinite(loss)
    without, with_masks = (sum(size for _, size in found.values()) for found in kept)
    shape = Shape(BATCH * LENGTH, 2, False, "none", masked=LENGTH)
    once, each = mask_bytes(EAGER_SIZES, shape)
    found = (with_masks - without) / (BATCH * LENGTH)
    common = 2 * 4 * EAGER_SIZES.rotary_width / BATCH  # tables that all rows share without masks
    bool_and_bounds = LENGTH + 3 * 4  # in the forward pass, not saved for backward
    assert found == EAGER_SIZES.num_layers * each + once - bool_and_bounds - common
