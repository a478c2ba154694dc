"""Estimates are the bytes of live engines."""

from __future__ import annotations

import json
import runpy
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalr.config.loading import load_run_config
from megalr.config.schema import RunConfig
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import UserError
from megalr.estimate.memory import GIB, data_parallel_size, estimate_memory
from megalr.estimate.states import state_bytes, wrapper_name
from megalr.estimate.tensors import drawing_bytes, stored_tensors
from megalr.hf.init_from_pretrained import with_pretrained_sizes
from megalr.models.build import sizes_of
from tests.ranks import run_distributed
from tests.training.runs import settings, zero
from tests.training.test_methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
BF16 = {"precision": "bf16"}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
FULL = {"method": {"name": "full_rank"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({**METHODS[name], "train": BF16}, zero(2))
        for name in ("sltrain", "mixed_ranks", "lora", "galore", "apollo_mini")
    },
    "spam": (
        {**FULL, "train": BF16, "optimizer": {"name": "spam", "density": 0.5, "update_gap": 6}},
        zero(2),
    ),
    "muon": ({**METHODS["muon"], **FULL, "train": BF16}, zero(2)),
    "spectron": ({**METHODS["spectron"], "train": BF16}, zero(2)),
    "normuon": ({**METHODS["normuon"], **FULL, "train": BF16}, zero(2)),
    "scale": ({**METHODS["scale"], **METHODS["sltrain"], "train": BF16}, zero(2)),
    "scale, tied": (
        {**METHODS["scale"], "train": BF16, "model": {"tie_embeddings": True}},
        zero(1),
    ),
    "galore, 8 bits": (
        {
            "method": {**METHODS["galore"]["method"], "state_bits": 8},
            "train": BF16,
            "model": {"hidden_size": 96, "intermediate_size": 2048},
        },
        zero(2),
    ),
    "no ZeRO, float32": ({}, zero(0)),
    "no ZeRO": ({"train": BF16}, zero(0)),
    "no ZeRO, pure bf16": ({**METHODS["sltrain"], "train": {"precision": "paper_bf16"}}, zero(0)),
    "ZeRO 1": ({"train": BF16}, zero(1)),
    "ZeRO 2": ({"train": BF16}, zero(2)),
    "ZeRO 2, pure bf16": ({"train": {"precision": "paper_bf16"}}, zero(2)),
    "ZeRO 3": ({"train": BF16}, zero(3)),
    "ZeRO 2, offload": ({"train": BF16}, zero(2, **OFFLOAD)),
}


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors with at least one dimension inside nested states."""
    if isinstance(value, torch.Tensor):
        return [value] if value.dim() else []
    parts = value.values() if isinstance(value, dict) else value if _is_list(value) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _measure(values: dict[str, Any], ds_user: dict[str, Any]) -> dict[str, Any]:
    """Bytes on this rank of an engine after one update."""
    import deepspeed.comm
    import torch.distributed as dist

    from megalr.engine.build import build_engine, set_learning_rate
    from megalr.models.build import build_model

    config = RunConfig.model_validate(values)
    decoder = build_model(config, torch.device("cpu"))
    ds_config = resolve_deepspeed_config(config, ds_user, "test", dist.get_world_size())
    engine = build_engine(config, ds_config, decoder)
    buckets, reduce = [0], engine.allreduce_bucket

    def allreduce_bucket(bucket: list[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        buckets.append(sum(tensor.numel() for tensor in bucket))
        return reduce(bucket, *args, **kwargs)

    engine.allreduce_bucket = allreduce_bucket
    summed, all_reduce = [0], deepspeed.comm.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        summed.append(tensor.numel() if tensor.numel() > 1 else 0)  # no norms
        return all_reduce(tensor, *args, **kwargs)

    ids = torch.arange(48).reshape(2, 24)
    with mock.patch.object(deepspeed.comm, "all_reduce", counted):
        for number in range(engine.gradient_accumulation_steps()):
            if number == 1:
                step_gradients = _bytes(p.grad for p in decoder.parameters() if p.grad is not None)
                groups = getattr(engine.optimizer, "averaged_gradients", {}).values()
                sums = _bytes(g.flat_partition for g in groups if hasattr(g, "flat_partition"))
            set_learning_rate(engine, 0.01)
            engine.backward(engine(ids, ids.roll(-1, 1), scale=0.01).clone(), scale_wrt_gas=False)
            engine.step()
    wrapper = engine.optimizer
    held = [getattr(p, "ds_tensor", p) for p in decoder.parameters() if p.requires_grad]
    frozen = [p for p in decoder.parameters() if not p.requires_grad]
    masters, gradients = [], []
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        masters, gradients = (
            wrapper.fp32_partitioned_groups_flat,
            [wrapper.grad_partitions_flat_buffer],
        )
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        masters = wrapper.single_partition_of_fp32_groups
    elif hasattr(wrapper, "fp32_groups_flat_partition"):
        masters, gradients = wrapper.fp32_groups_flat_partition, wrapper.fp32_groups_gradients_flat
    elif hasattr(wrapper, "fp32_groups"):
        masters = [p for group in wrapper.fp32_groups for p in group]
    counts = {
        "wrapper": type(wrapper).__name__,
        "bucket": max(buckets),
        "summed": sum(summed),
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in decoder.parameters()),
        "micro_batches": engine.gradient_accumulation_steps(),
        "step_gradients": step_gradients,  # between two micro-batches
        "sums": sums,  # of ZeRO 2, on the device also with offload
        "weights": _bytes(held),
        "frozen": _bytes([*frozen, *decoder.buffers()]),
        "masters": _bytes(masters),
        "gradients": _bytes(gradients),
        "moments": _bytes(_tensors(dict(engine.basic_optimizer.state))),
    }
    engine.destroy()
    return counts


def _measure_all(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [_measure(*case) for case in cases]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks holds, by case."""
    folder = tmp_path_factory.mktemp("estimate")
    cases = [(settings(folder, folder, **values), user) for values, user in CASES.values()]
    ranks = run_distributed(_measure_all, 2, cases)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_the_live_engine(
    name: str, measured: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    values, user = CASES[name]
    config = RunConfig.model_validate(settings(tmp_path, tmp_path, **values))
    sizes = sizes_of(config)
    ds_config = resolve_deepspeed_config(config, user, "test", 2)
    tensors = stored_tensors(sizes, config.method)
    drawing = drawing_bytes(sizes, config.method)
    found = state_bytes(config, ds_config, tensors, sizes.num_layers, 2, drawing)
    ranks = measured[name]
    if found.wrapper == "none":
        assert ranks[0]["wrapper"] not in ("BF16_Optimizer", "DeepSpeedZeroOptimizer")
    else:
        assert ranks[0]["wrapper"] == found.wrapper
    if found.on_host:
        masters, moments = ranks[0]["masters"], ranks[0]["moments"]
        # The .grad of the masters and a bf16 copy of the weights are there besides.
        assert found.on_host == masters + moments + masters + masters // 2
        assert (found.masters, found.moments) == (0, 0)
        assert ranks[0]["sums"] == found.gradients > 0
        return
    # Each of at most four flat groups is padded to a multiple of 2 elements a rank, of 4 bytes;
    # the parameters are views without the padding. ZeRO 3 pads each parameter by itself.
    spare = 4 * (2 * 2) * 4
    assert ranks[0]["weights"] == pytest.approx(found.weights, abs=spare)
    assert ranks[0]["frozen"] == found.frozen
    assert ranks[0]["masters"] == found.masters
    if found.wrapper in ("BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"):
        assert ranks[0]["gradients"] == found.gradients
    if name == "ZeRO 2":
        assert ranks[0]["sums"] == found.gradients > 0
    if found.wrapper == "BF16_Optimizer":
        # Whole flat groups enter one bucket, are flattened in float32 and converted to bf16.
        assert 6 * ranks[0]["bucket"] == found.update
    # Scalars a tensor (norms of limiters) are left out of the formulas.
    average = sum(rank["moments"] for rank in ranks) / 2
    assert average == pytest.approx(found.moments, rel=2e-3)


@pytest.mark.parametrize("name", ["no ZeRO, pure bf16", "ZeRO 1", "ZeRO 2", "ZeRO 2, pure bf16"])
def test_what_an_update_sums_over_ranks(
    name: str, measured: dict[str, list[dict[str, Any]]]
) -> None:
    rank = measured[name][0]
    if name == "ZeRO 1":
        padding = 3 * 2 * 2  # of three flat groups
        assert rank["trained"] <= rank["summed"] <= rank["trained"] + padding
        assert rank["step_gradients"] == 2 * rank["trained"]
    elif name == "no ZeRO, pure bf16":
        assert rank["summed"] == rank["trained"]
        assert rank["step_gradients"] == 2 * rank["trained"]
    else:
        assert rank["micro_batches"] == 3
        assert rank["summed"] == 3 * rank["trained"]
        assert rank["step_gradients"] == 0


def _config(model: str, method: dict, micro: int, batch: int, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": model},
            "method": method,
            "optimizer": {"lr": 1e-3},
            "data": {"train": "unused", "sequence_length": 256},
            "train": {
                "updates": 100,
                "global_batch_size": batch,
                "micro_batch_size": micro,
                **train,
            },
        }
    )


LOW_1B = {"name": "low_rank", "rank": 512, "alpha": 32.0}


def test_a_cuda_graph_keeps_its_memory_beside_the_update() -> None:
    """On two ranks, whose update copies whole groups of gradients."""
    plain = estimate_memory(_config("llama_1b", LOW_1B, 16, 32), zero(1), "x", 2)
    config = _config("llama_1b", LOW_1B, 16, 32, cuda_graphs=True)
    graphed = estimate_memory(config, zero(1), "x", 2)
    s, a = plain.states, plain.activations
    assert a.kept > s.weights  # so gradients need no memory of their own
    assert plain.peak == plain.fixed + max(a.kept + a.work, s.step_gradients + s.update)
    assert plain.peak_parts()[0] == "in forward and backward"
    assert graphed.peak == plain.fixed + a.kept + a.work + s.update


def test_a_graph_that_computes_blocks_again_holds_gradients_besides() -> None:
    train = {"activation_checkpointing": "full", "compile": True, "precision": "paper_bf16"}
    config = _config("llama_1b", LOW_1B, 64, 64, cuda_graphs=True, **train)
    found = estimate_memory(config, zero(0), "x", 1)
    assert found.activations.kept > found.states.weights
    gradients = found.states.weights - 2 * 32000 * 2048  # the embedding's is made last
    assert found.graph == found.activations.kept + found.activations.work + gradients


@pytest.mark.parametrize("gpus", [8, 1024])
def test_the_start_is_never_the_peak(gpus: int) -> None:
    """Of no recipe, at any ZeRO stage, with the smallest micro-batches."""
    cuts = ((0, 1), (1, 1), (2, 1), (3, 1), (0, 4), (1, 4), (2, 4))  # stage, tensor-parallel ranks
    for recipe in _recipes():
        given = load_run_config([recipe])
        for stage, tensor in cuts:
            train = given.train.model_copy(
                update={"micro_batch_size": 1, "global_batch_size": gpus, "cuda_graphs": False}
            )
            parallel = given.parallel.model_copy(update={"tensor": tensor})
            config = given.model_copy(update={"train": train, "parallel": parallel})
            try:
                found = estimate_memory(config, zero(stage), recipe.name, gpus)
            except UserError:
                continue  # this method, stage and number of ranks do not go together
            moment, _ = found.peak_parts()
            assert moment != "at the start", (recipe.name, stage, tensor)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_printed_parts_add_up_to_the_printed_peak(
    stage: int, graphs: bool, accumulation: int
) -> None:
    if graphs and stage == 3:
        pytest.skip("refused")
    for preset, micro in (("llama_60m", 64), ("llama_1b", 3), ("llama_7b", 1)):
        config = _config(
            preset, LOW_1B | {"rank": 128}, micro, 2 * accumulation * micro, cuda_graphs=graphs
        )
        found = estimate_memory(config, zero(stage), "x", 2)
        rows, needs = found.table().split("\n" + "-" * 50 + "\n")
        parts = [Decimal(line.split()[-1]) for line in rows.splitlines()]
        peak = Decimal(needs.splitlines()[0].split()[1])
        assert sum(parts) == peak
        assert float(peak) == pytest.approx(found.peak / GIB, abs=5.1e-4)
        assert found.peak == sum(found.peak_parts()[1].values())
        assert found.peak == max(sum(parts.values()) for parts in found.moments().values())
        assert found.needed == pytest.approx(1.15 * found.peak + 2 * GIB, abs=1)


def test_loro_keeps_directions_during_its_step() -> None:
    adamw, loro = (
        estimate_memory(_config("llama_1b", method, 64, 64), zero(1), "x", 1).states
        for method in (LOW_1B, {"name": "loro", "rank": 512})
    )
    assert adamw.update == 0
    # Of the factors' group twice, which is more than half of all.
    config = _config("llama_1b", LOW_1B, 64, 64)
    tensors = stored_tensors(sizes_of(config), config.method)
    factors = sum(t.numel * (24 if t.block else 1) for t in tensors if t.group == "factors")
    assert loro.update == pytest.approx(2 * 4 * factors, rel=1e-6)


def test_gradients_that_add_up_outside_of_a_graph_are_there_twice() -> None:
    once, twice = (
        estimate_memory(
            _config("llama_1b", LOW_1B, 16, batch, cuda_graphs=True, precision="paper_bf16"),
            zero(0),
            "x",
            1,
        )
        for batch in (16, 32)
    )
    assert twice.peak - once.peak == once.states.weights == once.states.step_gradients


def test_a_bucket_of_one_group_is_not_flattened() -> None:
    """7B full-rank: the matrices are one bucket, which is converted to bf16 and not copied else."""
    config = _config("llama_7b", FULL["method"], 1, 8)
    found = estimate_memory(config, zero(1), "x", 8)
    tensors = stored_tensors(sizes_of(config), config.method)
    matrices = sum(
        t.numel * (32 if t.block else 1) for t in tensors if t.group in ("targets", "matrices")
    )
    assert found.states.update == pytest.approx(2 * matrices, abs=2 * 16)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_an_update_copies_under_bf16_optimizer(gpus: int) -> None:
    """One rank reduces nothing, and gathers a group's gradients of several micro-batches."""
    one, several = (
        estimate_memory(_config("llama_60m", FULL["method"], 8, gpus * batch), zero(1), "x", gpus)
        for batch in (8, 16)
    )
    elements = one.states.weights // 2
    if gpus == 1:
        assert one.states.update == 0
        assert several.states.update == pytest.approx(2 * elements, rel=1e-3)  # but for the norms
    else:
        assert one.states.update == several.states.update == 6 * elements


def test_recomputed_blocks_keep_their_input_only() -> None:
    method = {"name": "low_rank", "rank": 256, "alpha": 256.0}
    train = {"activation_checkpointing": "full", "compile": True}
    config = _config("llama_350m", method, 64, 64, **train)
    found = estimate_memory(config, zero(1), "x", 1).activations
    assert found.kept == 24 * (64 * 256) * 1024 * 2
    # One block is alive again in backward: 8 h + 7 r + 3 f numbers a token at least.
    assert found.work > 64 * 256 * 2 * (8 * 1024 + 7 * 256 + 3 * 2752)


def test_recomputed_blocks_that_keep_their_bottlenecks() -> None:
    """h + 7 r numbers a token, which tests/models/test_recompute.py counts in autograd."""
    method = {"name": "low_rank", "rank": 256, "alpha": 256.0}
    train = {"activation_checkpointing": "bottleneck", "compile": True}
    found = estimate_memory(_config("llama_350m", method, 64, 64, **train), zero(1), "x", 1)
    assert found.activations.kept == 24 * (64 * 256) * (1024 + 7 * 256) * 2


def test_gathered_weights_of_zero_3() -> None:
    """2 bytes of what the limits allow, one block and the head; tests/engine/test_whole_blocks.py
    counts them in a live engine."""
    h, f, V = 4096, 11008, 32000
    compiled = _config("llama_7b", FULL["method"], 16, 32, compile=True)
    none = zero(3, stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    least, usual, most = (
        estimate_memory(config, user, "x", 2).states.buckets
        for config, user in (
            (compiled, none),
            (compiled, zero(3)),
            (_config("llama_7b", FULL["method"], 16, 32), none),
        )
    )
    bucket = 3 * 2 * 50_000_000  # one that fills and two copies
    assert least == bucket + 2 * (4 * h * h + 3 * h * f + 2 * h + V * h)
    assert usual == least + 2 * 1_000_000_000
    assert most == bucket + 2 * (32 * (4 * h * h + 3 * h * f + 2 * h) + 2 * V * h + h)


def test_the_step_of_zero_3_copies_the_gradients_of_one_sub_group() -> None:
    """7B on two ranks: 3.37e9 elements each, 1e9 in a sub-group."""
    config = _config("llama_7b", FULL["method"], 16, 32, activation_checkpointing="full")
    found = estimate_memory(config, zero(3), "x", 2)
    assert found.states.update == 4 * 1_000_000_000
    whole = estimate_memory(config, zero(3, sub_group_size=10**12), "x", 2)
    total = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    vectors = (2 * 32 + 1) * 4096
    assert whole.states.update == 4 * (total - vectors) // 2
    # Recorded on two H200s (benchmarks/results/sharded_2gpu.json): 60.59 GiB reserved.
    assert 0.97 < found.peak / 2**30 / 60.59 < 1.07


def test_wrappers_by_hand() -> None:
    assert wrapper_name("bf16", 1, "fp32", offload=False) == "BF16_Optimizer"
    assert wrapper_name("bf16", 1, "fp32", offload=True) == "DeepSpeedZeroOptimizer"
    assert wrapper_name("paper_bf16", 0, "bf16", offload=False) == "none"
    assert wrapper_name("paper_bf16", 1, "bf16", offload=False) == "DeepSpeedZeroOptimizer"


def test_gpus_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="6 GPUs cannot be cut into tensor-parallel groups of 4"):
        data_parallel_size(6, 4)


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The tool's exit code, in this process."""
    recipe = str(ROOT / "recipes" / "llama_1b_low_rank.yaml")
    command = ["estimate_memory.py", "--config", recipe, "train.compile=true", "--gpus", "8"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "estimate_memory.py"), run_name="__main__")
    return int(ended.value.code or 0)


def _peak_of(lines: list[str]) -> float:
    return float(next(line.split()[1] for line in lines if line.startswith("peak ")))


def test_the_tool_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run_tool(monkeypatch) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "one of 8 GPUs, micro-batch 16 x 256, BF16_Optimizer, GiB:" in lines
    counts = [int(line.split()[-1].replace(",", "")) for line in lines[: lines.index("")]]
    assert counts[0] == sum(counts[1:]) > 10**9 // 2
    whole = _peak_of(lines)
    assert whole > 10
    assert _run_tool(monkeypatch, "--tensor", "2") == 0
    assert _peak_of(capsys.readouterr().out.splitlines()) < whole


def test_the_tool_refuses_gpus_that_do_not_divide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run_tool(monkeypatch, "--tensor", "3") == 2
    assert capsys.readouterr().err.startswith("error: 8 GPUs cannot be cut")


def test_a_pretrained_model_gives_its_sizes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    config = _config("llama_9m", {"name": "full_rank"}, 2, 2)
    values = config.model_dump() | {"model": {"from_pretrained": str(tmp_path)}}
    found = sizes_of(with_pretrained_sizes(RunConfig.model_validate(values)))
    assert (found.hidden_size, found.intermediate_size, found.num_layers) == (64, 160, 3)
    assert (found.num_heads, found.kv_heads, found.vocab_size) == (4, 2, 320)


def _recipes() -> list[Path]:
    recipes = (ROOT / "recipes").rglob("*.yaml")
    return sorted(path for path in recipes if path.parent.name != "sweeps")


def test_every_recipe_has_an_estimate() -> None:
    for recipe in _recipes():
        config = load_run_config([recipe])
        fewest = [estimate_memory(config, zero(2), recipe.name, gpus).fixed for gpus in (1, 2)]
        assert fewest[0] > fewest[1] > 0, recipe
