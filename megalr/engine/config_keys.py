"""Keys of a DeepSpeed JSON that megalr accepts, fixes or refuses, and why.

The lists were reviewed against DeepSpeed 0.19.8; tests/engine/test_deepspeed_facts.py compares
them with what the installed DeepSpeed reads.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

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
