"""The user's DeepSpeed JSON is completed, or refused with every problem and both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalr.config import RunConfig, load_run_config
from megalr.engine.config import BLOCK, read_deepspeed_json, resolve_deepspeed_config, solve_batch
from megalr.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
RUN = [
    "run.dir=x",
    "model.preset=llama_60m",
    "optimizer.lr=1e-3",
    "data.train=d",
    "train={updates: 3, global_batch_size: 512, micro_batch_size: 16}",
]


def run_with(*overrides: str) -> RunConfig:
    return load_run_config([], [*RUN, *overrides])


def refusal(user: dict[str, Any], *overrides: str, ranks: int = 4) -> str:
    with pytest.raises(UserError) as caught:
        resolve_deepspeed_config(run_with(*overrides), user, "ds.json", ranks)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve_to_values_without_auto(path: Path) -> None:
    precision = "paper_bf16" if path.stem == "paper_bf16" else "bf16"
    config = run_with(f"train.precision={precision}", "train.gradient_clipping=0.5")
    user = read_deepspeed_json(path)
    before = json.dumps(user)
    resolved = resolve_deepspeed_config(config, user, path.name, 4)
    assert json.dumps(user) == before
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 512
    assert resolved["train_micro_batch_size_per_gpu"] == 16
    assert resolved["gradient_accumulation_steps"] == 8
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is True and resolved["fp16"]["enabled"] is False
    assert resolved["bf16"]["bf16_optimizer_states"] is (precision == "paper_bf16")
    assert resolved["zero_optimization"]["stage"] == user["zero_optimization"]["stage"]
    offload = resolved["zero_optimization"].get("offload_optimizer")
    assert (offload is not None) == path.stem.endswith("_offload")


def test_seven_configs_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == [
        "paper_bf16",
        "zero0",
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    ]


def test_a_value_the_user_chose_is_kept_and_an_empty_json_is_completed() -> None:
    user = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
        "data_types": {"grad_accum_dtype": "bf16"},
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
        "log_level": "warning",
        "fp16": {"enabled": "auto", "loss_scale": 0},
    }
    resolved = resolve_deepspeed_config(run_with(), user, "ds.json", 4)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1000
    assert resolved["zero_optimization"]["overlap_comm"] is False
    assert resolved["data_types"]["grad_accum_dtype"] == "bf16"
    assert resolved["wall_clock_breakdown"] is True
    assert resolved["comms_logger"] == {"enabled": True}
    empty = resolve_deepspeed_config(run_with("train.precision=fp32"), {}, "none", 1)
    assert empty["zero_optimization"]["stage"] == 0 and empty["bf16"]["enabled"] is False
    assert empty["communication_data_type"] == empty["data_types"]["grad_accum_dtype"] == "fp32"


def test_zero_3_prefetches_the_largest_block() -> None:
    def size(*overrides: str, **zero: Any) -> int:
        user = {"zero_optimization": {"stage": 3, **zero}}
        resolved = resolve_deepspeed_config(run_with(*overrides), user, "ds.json", 4)
        assert resolved["zero_optimization"]["leaf_module"]["classes"] == [BLOCK]
        return resolved["zero_optimization"]["stage3_prefetch_bucket_size"]

    block = 4 * 4096**2 + 3 * 4096 * 11008  # norms stay whole on every rank
    assert size("model.preset=llama_7b") == block
    assert size("model.preset=llama_7b", stage3_param_persistence_threshold=0) == block + 2 * 4096
    assert size("model.preset=llama_7b", stage3_prefetch_bucket_size=7) == 7
    low_rank = "method={name: low_rank, rank: 8"
    equal, unlike = (
        size(f"{low_rank}{ranks}}}", stage3_param_persistence_threshold=0)
        for ranks in ("", ", ranks: {layers.3.mlp.down: 500}")
    )
    assert unlike - equal == (500 - 8) * (512 + 1408)  # the MLP's width, padded


def test_pure_bf16_without_zero_leaves_deepspeeds_bf16_mode_off() -> None:
    user = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}
    run = run_with("train.precision=paper_bf16")
    resolved = resolve_deepspeed_config(run, user, "ds.json", 4)
    bf16 = resolved["bf16"]
    assert bf16["enabled"] is bf16["bf16_master_weights_and_grads"] is False
    assert bf16["bf16_optimizer_states"] is False
    assert resolved["data_types"]["grad_accum_dtype"] == "bf16"
    assert resolved["communication_data_type"] == "bf16"


NEUTRAL = {
    "accelerate": {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": None, "ratio": 1.0},
            "offload_param": {"device": "auto", "nvme_path": "auto"},
            "stage3_prefetch_bucket_size": "auto",
            "sub_group_size": "auto",
            "overlap_comm": None,
            "allgather_partitions": True,
            "zero_quantized_weights": False,
            "zero_hpz_partition_size": 1,
            "stage3_module_granularity_threshold": 0,
        },
        "steps_per_print": float("inf"),
        "fp16": {"enabled": False, "loss_scale": 0, "auto_cast": None},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False},
    },
    "disabled": {
        "zero_optimization": {"stage": "auto"},
        "tensorboard": {"enabled": False, "output_path": "logs"},
        "wandb": {"enabled": False, "project": "x"},
        "amp": {"enabled": False, "opt_level": "auto"},
        "elasticity": {"enabled": False},
        "sparse_gradients": False,
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "compile": {"deepcompile": False},
        "data_efficiency": {},
        "optimizer": None,
        "scheduler": "auto",
        "sequence_parallel_size": 1,
        "flops_profiler": {"enabled": False, "output_file": None},
        "bf16": None,
    },
    "no ZeRO": {"zero_optimization": False},
}


@pytest.mark.parametrize("name", list(NEUTRAL))
def test_values_that_ask_for_nothing_change_nothing(name: str) -> None:
    user = NEUTRAL[name]
    zero = user.get("zero_optimization") or {}
    stage = zero["stage"] if isinstance(zero.get("stage"), int) else 0
    bare = resolve_deepspeed_config(run_with(), {"zero_optimization": {"stage": stage}}, "x", 4)
    resolved = resolve_deepspeed_config(run_with(), user, "ds.json", 4)
    for key in ("fp16", "flops_profiler"):  # passed on, and disabled
        assert not resolved.pop(key, {}).get("enabled") and not bare.pop(key, {}).get("enabled")
    for key in ("offload_optimizer", "offload_param"):
        section = resolved["zero_optimization"].pop(key, {})
        assert section.get("device", "none") == "none" and section.get("ratio", 1.0) == 1.0
    resolved["zero_optimization"].pop("stage3_module_granularity_threshold", None)
    assert resolved == bare


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"zero_optimization": {"stage": True}}, "stage = true: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "must be like true"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": 0}}, "must be at least 1"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 0}}, "must be at least 1"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e30}}, "number below 2^63"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 2.5}}, "valid integer"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "relies on false"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "not possible here"),
        ({"zero_optimization": {"offload_param": True}}, "must be an object"),
        ({"steps_per_print": 0}, "must be at least 1"),
        ({"steps_per_print": float("nan")}, "must be a number below 2^63"),
        ({"gradient_clipping": True}, "gradient_clipping = true: the run asks for 1.0"),
        ({"checkpoint": {"tag_validation": "Perhaps"}}, "must be Ignore or Warn or Fail"),
        ({"log_level": "loud"}, "must be debug or info"),
        ({"tensorboard": {"enabled": True}}, "not possible here"),
        ({"bfloat16": {"enabled": False}}, "write bf16"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "not possible here"),
        ({"flops_profiler": {"enabled": "no"}}, "must be like false"),
        ({"misspelt\nkey": None}, "'misspelt\\nkey' = null: unknown key"),
    ],
)
def test_values_that_ask_for_something_else_are_refused_in_one_line(
    user: dict[str, Any], said: str
) -> None:
    message = refusal(user)
    assert said in message and len(message.splitlines()) == 1, message


def test_all_mistakes_of_a_json_are_reported_together() -> None:
    message = refusal(
        {
            "zero_optimizationn": {"stage": 2},
            "gradient_clippingg": 1.0,
            "optimizer": {"type": "Adam"},
            "scheduler": {},
            "zero_optimization": {
                "stage": 2,
                "overlap_com": True,
                "stage3_prefetch_bucket_sizes": 3,
                "reduce_bucket_size": -3,
                "allgather_partitions": False,
                "offload_optimizer": {"device": "cpu", "pin_memoryy": True},
            },
            "bf16": {"enabledd": True},
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.25,
            "zero_allow_untested_optimizer": False,
            "steps_per_print": "often",
            "comms_logger": {"enable": True},
            "nonsense_of_mine": 1,
        }
    )
    expected = [
        "zero_optimizationn = {'stage': 2}: unknown key; did you mean zero_optimization?",
        "gradient_clippingg = 1.0: unknown key; did you mean gradient_clipping?",
        "optimizer = {'type': 'Adam'}: not possible here: use optimizer.* of the run",
        "scheduler = {}: not possible here: use schedule.* of the run",
        "zero_optimization.overlap_com = true: unknown key; did you mean "
        "zero_optimization.overlap_comm?",
        "zero_optimization.stage3_prefetch_bucket_sizes = 3: unknown key; did you mean "
        "zero_optimization.stage3_prefetch_bucket_size?",
        "zero_optimization.reduce_bucket_size = -3: must be greater than 0",
        "zero_optimization.allgather_partitions = false: not possible here",
        "zero_optimization.offload_optimizer.pin_memoryy = true: unknown key; did you mean "
        "zero_optimization.offload_optimizer.pin_memory?",
        "bf16.enabledd = true: unknown key; did you mean bf16.enabled?",
        "train_micro_batch_size_per_gpu = 8: the run asks for 16 (train.micro_batch_size = 16)",
        "gradient_clipping = 0.25: the run asks for 1.0 (train.gradient_clipping = 1.0)",
        "zero_allow_untested_optimizer = false: megalr relies on true",
        "steps_per_print = 'often': must be like 1000000000",
        "comms_logger.enable = true: unknown key; did you mean comms_logger.enabled?",
        "nonsense_of_mine = 1: unknown key; DeepSpeed would silently ignore it",
    ]
    lines = message.splitlines()
    for start in expected:
        assert sum(line.startswith(f"ds.json: {start}") for line in lines) == 1, (start, message)
    assert len(lines) == len(expected), message


@pytest.mark.parametrize(
    ("user", "overrides", "said"),
    [
        ({"zero_optimization": {"stage": 4}}, (), "stage = 4: must be 0, 1, 2 or 3"),
        ({"zero_optimization": True}, (), "must be an object"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            (),
            "grad_accum_dtype = 'fp32': must be bf16 with train.precision = bf16 and "
            "zero_optimization.stage = 0",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            ("train.precision=paper_bf16",),
            "grad_accum_dtype = 'fp32': must be bf16 with train.precision = paper_bf16",
        ),
        (
            {"bf16": {"enabled": True}},
            ("train.precision=paper_bf16",),
            "the run asks for false (train.precision = paper_bf16); write 'auto' here",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            (),
            "offload_param: needs ZeRO stage 3, not 2",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            (),
            "offload_optimizer.device = 'nvme': must be cpu",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            ("train.precision=paper_bf16",),
            "paper_bf16 cannot be offloaded",
        ),
        ({"bf16": {"enabled": True}}, ("train.precision=fp32",), "the run asks for false"),
        ({"fp16": {"enabled": True}}, (), "fp16.enabled = true: the run asks for false"),
        ({"communication_data_type": "fp16"}, (), "must be fp32 or bf16"),
    ],
)
def test_combinations_that_cannot_work(
    user: dict[str, Any], overrides: tuple[str, ...], said: str
) -> None:
    assert said in refusal(user, *overrides)


def test_batch_triangle_is_solved_or_explained_with_sizes_that_work() -> None:
    assert solve_batch(run_with(), 8) == 4
    assert solve_batch(run_with("train.gradient_accumulation=4"), 8) == 4
    message = refusal({}, ranks=24)
    assert "512: is no multiple of train.micro_batch_size 16 x 24 data-parallel ranks = 384" in (
        message
    )
    assert "nearest train.global_batch_size: 384 or 768" in message
    message = refusal({}, ranks=5 * 2**4)  # 512 / 80 is no whole number: no micro-batch works
    assert "or train.micro_batch_size" not in message
    message = refusal({}, ranks=64)  # 512 / 64 = 8 sequences a rank
    assert message.endswith(
        "nearest train.global_batch_size: 1024; or train.micro_batch_size: 4 or 8"
    )
    message = refusal({}, "train.gradient_accumulation=4")
    assert "micro_batch_size 16 x train.gradient_accumulation 4 x 4 data-parallel ranks = 256" in (
        message
    )


def test_json_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for content, said in (
        (b'{"a": 1, "a": 2}', "given twice: a"),
        (b'{"a": }', "not valid JSON: line 1, column 7"),
        (b"[]", "must be a JSON object"),
        (b"\xff", "not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_deepspeed_json(path)
    with pytest.raises(UserError, match="No such file"):
        read_deepspeed_json(tmp_path / "missing.json")
