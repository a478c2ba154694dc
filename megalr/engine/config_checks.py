"""Checks of a user's DeepSpeed JSON that DeepSpeed does not make, or makes only once it trains.

DeepSpeed ignores unknown keys outside its pydantic models and takes any type there. The lists of
keys that megalr accepts, fixes or refuses were reviewed against DeepSpeed 0.19.8;
tests/engine/test_deepspeed_facts.py compares them with what the installed DeepSpeed reads.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from megalr.config.problems import nearest, printable, shown
from megalr.config.schema import RunConfig

_REASONS: dict[str, str] = {
    "use optimizer.* of the run's configuration": "optimizer",
    "use schedule.* of the run's configuration": "scheduler",
    "use train.activation_checkpointing of the run's configuration": "activation_checkpointing",
    "use train.compile of the run's configuration": "compile",
    "use train.precision of the run's configuration": "data_types.param_dtype",
    "use log.tensorboard or log.wandb_project of the run's configuration": (
        "tensorboard wandb comet"
    ),
    "metrics are in metrics.jsonl of the run folder": "csv_monitor",
    "write bf16": "bfloat16",
    "megalr's own training loop does this": (
        "autotuning data_efficiency dataloader_drop_last hybrid_engine"
    ),
    "checkpoints are written through DeepSpeed's standard engine": (
        "datastates_ckpt checkpoint.writer"
    ),
    "checkpoints change shape through the universal format": (
        "zero_optimization.elastic_checkpoint"
    ),
    "megalr shards its model itself": (
        "pipeline tensor_parallel expert_parallel sequence_parallel_size "
        "seq_parallel_communication_data_type use_data_before_expert_parallelism "
        "checkpoint.parallel_write"
    ),
    "it changes the numbers that megalr computes": (
        "weight_quantization zero_optimization.zenflow zero_optimization.zero_quantized_gradients "
        "data_types.buffer_dtype data_types.keep_in_fp32_modules"
    ),
    "restarts and export would miss the second copy of the weights that this keeps": (
        "zero_optimization.zero_hpz_partition_size zero_optimization.zero_quantized_weights "
        "zero_optimization.zero_quantized_nontrainable_weights"
    ),
    "no effect on a megalr run": (
        "vocabulary_size disable_allgather zero_optimization.allgather_partitions "
        "zero_optimization.save_muon_momentum_buffer_in_memory checkpoint.checkpoint_serialization "
        "zero_optimization.offload_optimizer.cpuadam_cores_perc"
    ),
    "DeepSpeed has removed this feature": (
        "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting "
        "nebula progressive_layer_drop quantize_training sparse_attention sparse_gradients "
        "zero_optimization.legacy_stage1 zero_optimization.mics_shard_size "
        "zero_optimization.mics_hierarchical_params_gather zero_optimization.zeropp_loco_param"
    ),
    "write offload_optimizer": "zero_optimization.cpu_offload",
    "write offload_param": "zero_optimization.cpu_offload_param",
    "write offload_optimizer.pin_memory": "zero_optimization.cpu_offload_use_pin_memory",
    "write stage3_gather_16bit_weights_on_model_save": (
        "zero_optimization.stage3_gather_fp16_weights_on_model_save"
    ),
    "offload to NVMe is not supported": (
        "aio zero_optimization.offload_optimizer.nvme_path "
        "zero_optimization.offload_param.nvme_path"
    ),
    "the optimizer state is offloaded whole": (
        "zero_optimization.offload_optimizer.ratio "
        "zero_optimization.offload_optimizer.super_offload"
    ),
}
REFUSED_KEYS: dict[str, str] = {
    key: reason for reason, keys in _REASONS.items() for key in keys.split()
}
"""Keys that DeepSpeed knows and megalr refuses, with the reason or the remedy."""

FIXED_KEYS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.gradient_clipping",
    "bf16.enabled": "train.precision",
    "bf16.bf16_master_weights_and_grads": "train.precision",
    "bf16.bf16_optimizer_states": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "gradient_allreduce_op": "",
    "managed_gradient_accumulation": "",
    "prescale_gradients": "",
    "gradient_predivide_factor": "",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "checkpoint.load_universal": "",
    "checkpoint.use_node_local_storage": "",
    "zero_optimization.compute_grad_norm": "",
    "zero_optimization.round_robin_gradients": "",
    "zero_optimization.parameter_alignment": "",
    "zero_optimization.load_from_fp32_weights": "",
    "zero_optimization.stage3_module_granularity_threshold": "",
    "zero_optimization.leaf_module.classes": "",
    "zero_optimization.leaf_module.names": "",
    "zero_optimization.leaf_module.name_suffixes": "",
    "bf16.check_grad_overflow": "",
}
"""Keys that a JSON may only repeat: the key of the run's configuration they follow from, or ""
where megalr relies on one value."""

OPTIONAL_KEYS = ("flops_profiler", "comms_logger", "log_level")
"""Keys that are passed on when given but not written otherwise."""

ACTIVE_BY_PRESENCE = ("optimizer", "scheduler", "bfloat16")
"""Refused sections that ask for something by being there, whatever they hold."""

CHOICES: dict[str, tuple[str, ...]] = {
    "communication_data_type": ("fp32", "bf16"),
    "checkpoint.tag_validation": ("Ignore", "Warn", "Fail"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
}
"""Values of keys that DeepSpeed reads without checking, or that megalr takes a part of."""

AT_LEAST_ONE = (
    "steps_per_print",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size",
)
"""Numbers that DeepSpeed divides by though it accepts 0."""


def deepspeed_sections() -> dict[str, type[BaseModel]]:
    """DeepSpeed's models of the sections that megalr passes on."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }


@cache
def deepspeed_defaults() -> dict[str, Any]:
    """Dotted key to DeepSpeed's default, for the keys inside sections."""
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import get_aio_config, get_pipeline_config

    defaults: dict[str, Any] = {"sequence_parallel_size": 1}
    sections: dict[str, dict[str, Any]] = {
        "aio": get_aio_config({}),
        "pipeline": get_pipeline_config({}),
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
    }
    for section, values in sections.items():
        defaults |= {f"{section}.{name}": value for name, value in values.items()}
    for section, model in deepspeed_sections().items():
        _add_fields(defaults, model, f"{section}.")
    return defaults


def _add_fields(defaults: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        defaults[key] = None if field.default is PydanticUndefined else field.default
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                _add_fields(defaults, kind, f"{key}.")


def lay_over(
    target: dict[str, Any], user: dict[str, Any], config: RunConfig, prefix: str = ""
) -> list[str]:
    """Write the user's values into ``target``, the values that megalr would write.

    Values that ask for nothing (null, "auto", disabled sections, defaults of keys that megalr does
    not use) are passed over. Returns the problems: keys that are unknown or refused, values of the
    wrong type or out of range, values that contradict the run.
    """
    problems = []
    for name, value in user.items():
        key = f"{prefix}{name}"
        if key in REFUSED_KEYS:
            problem = "" if _is_neutral(key, value) else f"not possible here: {REFUSED_KEYS[key]}"
        elif not (name in target or key in FIXED_KEYS or _is_known(key)):
            problem = f"unknown key; {_hint(name, prefix, target)}"
        elif value is None or value == "auto":
            continue
        elif isinstance(target.get(name), dict) or _is_section(key):
            if value is False and f"{key}.enabled" in FIXED_KEYS:
                value = {"enabled": False}
            if isinstance(value, dict):
                target.setdefault(name, {})
                problems += lay_over(target[name], value, config, f"{key}.")
                continue
            problem = "" if value is False else "must be an object with keys of its own"
        elif key in FIXED_KEYS:
            expected = target.get(name, deepspeed_defaults().get(key))
            problem = _contradiction(key, value, expected, config)
        else:
            problem = _value_problem(key, value, target.get(name, deepspeed_defaults().get(key)))
            if not problem:
                target[name] = copy.deepcopy(value)
        if problem:
            problems.append(f"{printable(key)} = {shown(value)}: {problem}")
    return problems


def _is_neutral(key: str, value: Any) -> bool:
    """Whether the value of a refused key asks for nothing."""
    default = deepspeed_defaults().get(key)
    if value is None or value == "auto" or (value is False and default is not True):
        return True
    if not isinstance(value, dict):
        return bool(value == default) and _same_kind(value, default)
    if key in ACTIVE_BY_PRESENCE:
        return False
    enabled = value.get("enabled")
    if enabled is not None:
        return enabled is False
    return all(_is_neutral(f"{key}.{name}", item) for name, item in value.items())


def _is_known(key: str) -> bool:
    return key in OPTIONAL_KEYS or key in deepspeed_defaults()


def _is_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in deepspeed_defaults())


def _value_problem(key: str, value: Any, example: Any) -> str:
    """Why a value cannot be passed on; "" if it can, as far as is seen without its model."""
    if key in CHOICES:
        return "" if value in CHOICES[key] else f"must be {' or '.join(CHOICES[key])}"
    if example is not None and not _same_kind(value, example):
        return f"must be like {shown(example)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key == "steps_per_print" and value == math.inf:
            return ""
        if abs(value) >= 2**63 or value != value:  # NaN
            return "must be a number below 2^63"
        if key in AT_LEAST_ONE and value < 1:
            return "must be at least 1"
    return ""


def _same_kind(value: Any, example: Any) -> bool:
    if isinstance(value, bool) or isinstance(example, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int | float):
        return isinstance(value, int | float)
    return isinstance(value, str if isinstance(example, str) else type(example))


def _hint(name: str, prefix: str, target: dict[str, Any]) -> str:
    known = {key.removeprefix(prefix) for key in deepspeed_defaults() if key.startswith(prefix)}
    known |= {*target, *(OPTIONAL_KEYS if not prefix else ())}
    known = {key for key in known if "." not in key and f"{prefix}{key}" not in REFUSED_KEYS}
    if not prefix:
        known |= {key for key in REFUSED_KEYS if "." not in key}
    close = nearest(name, known)
    if close:
        return f"did you mean {prefix}{close}?"
    if not prefix:
        return "DeepSpeed would silently ignore it"
    return f"known: {', '.join(sorted(known))}"


def _contradiction(key: str, value: Any, expected: Any, config: RunConfig) -> str:
    if value == expected and _same_kind(value, expected):
        return ""
    run_key = FIXED_KEYS[key]
    if not run_key:
        return f"megalr relies on {shown(expected)}; leave the key out"
    section, name = run_key.split(".")
    given = getattr(getattr(config, section), name)
    follows = f"{run_key} = {given}" if given is not None else f"{run_key}, computed"
    return f"the run asks for {shown(expected)} ({follows}); write 'auto' here"


def model_problems(resolved: dict[str, Any]) -> list[str]:
    """Errors that DeepSpeed's own models find in the completed sections."""
    problems = []
    for section, model in deepspeed_sections().items():
        try:
            model(**resolved.get(section, {}))
        except ValidationError as error:
            for detail in error.errors():
                key = ".".join([section, *map(str, detail["loc"])])
                text = detail["msg"].replace("Input should be", "must be")
                text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
                problems.append(f"{printable(key)} = {shown(detail['input'])}: {text}")
    return problems


def combination_problems(config: RunConfig, resolved: dict[str, Any]) -> list[str]:
    """Values that DeepSpeed or megalr cannot do together (table in docs/dev/deepspeed-notes.md)."""
    problems = []
    precision, zero = config.train.precision, resolved["zero_optimization"]
    stage = zero["stage"]
    accumulate = resolved["data_types"]["grad_accum_dtype"]
    allowed = {"fp32": ("fp32",), "paper_bf16": ("bf16",)}.get(
        precision, ("bf16",) if stage == 0 else ("fp32", "bf16")
    )
    if accumulate not in allowed:
        problems.append(
            f"data_types.grad_accum_dtype = {shown(accumulate)}: must be {' or '.join(allowed)} "
            f"with train.precision = {precision} and zero_optimization.stage = {stage}"
        )
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "none":
            continue
        if device != "cpu":
            problems.append(f"zero_optimization.{name}.device = {shown(device)}: must be cpu")
        elif stage not in stages:
            problems.append(
                f"zero_optimization.{name}: needs ZeRO stage "
                f"{' or '.join(map(str, stages))}, not {stage}"
            )
        elif precision == "paper_bf16":
            problems.append(
                f"zero_optimization.{name}: train.precision = paper_bf16 cannot be offloaded; "
                "DeepSpeed asks for its own CPU optimizer there"
            )
    return problems
