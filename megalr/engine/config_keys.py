"""What megalr lets a DeepSpeed JSON say: the keys it may set, the ones it may not, and why.

The lists were reviewed against DeepSpeed 0.19.8; tests/engine/test_deepspeed_facts.py compares
them with what the installed DeepSpeed reads.
"""

from __future__ import annotations

_OTHER_LOOP = "megalr's own training loop does this"
_OTHER_PARALLELISM = "megalr's model is not cut up by DeepSpeed"
_METRICS = "use log.tensorboard or log.wandb_project of the run's configuration"
_NO_EFFECT = "no effect on a megalr run"
_REMOVED = "DeepSpeed has removed this feature"
_COPIES = "restarts and export would miss the second copy of the weights that this keeps"
_NUMERICS = "it changes the numbers that megalr computes"

REFUSED_KEYS: dict[str, str] = {
    "optimizer": "use optimizer.* of the run's configuration",
    "scheduler": "use schedule.* of the run's configuration",
    "activation_checkpointing": "use train.activation_checkpointing of the run's configuration",
    "compile": "use train.compile of the run's configuration",
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "csv_monitor": "metrics are in metrics.jsonl of the run folder",
    "comet": _METRICS,
    "bfloat16": "write bf16",
    "aio": "offload to NVMe is not supported",
    "autotuning": _OTHER_LOOP,
    "data_efficiency": _OTHER_LOOP,
    "dataloader_drop_last": _OTHER_LOOP,
    "hybrid_engine": _OTHER_LOOP,
    "datastates_ckpt": "checkpoints are written through DeepSpeed's standard engine",
    "pipeline": _OTHER_PARALLELISM,
    "tensor_parallel": _OTHER_PARALLELISM,
    "expert_parallel": _OTHER_PARALLELISM,
    "sequence_parallel_size": _OTHER_PARALLELISM,
    "seq_parallel_communication_data_type": _OTHER_PARALLELISM,
    "use_data_before_expert_parallelism": _OTHER_PARALLELISM,
    "weight_quantization": _NUMERICS,
    "vocabulary_size": _NO_EFFECT,
    "disable_allgather": _NO_EFFECT,
    "amp": _REMOVED,
    "compression_training": _REMOVED,
    "curriculum_learning": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "zero_optimization.cpu_offload": "write offload_optimizer",
    "zero_optimization.cpu_offload_param": "write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "write offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "write stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.elastic_checkpoint": "checkpoints change layout by universal checkpoints",
    "zero_optimization.allgather_partitions": _NO_EFFECT,
    "zero_optimization.zenflow": _NUMERICS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _NO_EFFECT,
    "zero_optimization.zero_hpz_partition_size": _COPIES,
    "zero_optimization.zero_quantized_weights": _COPIES,
    "zero_optimization.zero_quantized_nontrainable_weights": _COPIES,
    "zero_optimization.zero_quantized_gradients": _NUMERICS,
    "zero_optimization.offload_optimizer.nvme_path": "offload to NVMe is not supported",
    "zero_optimization.offload_optimizer.ratio": "the optimizer state is offloaded whole",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer state is offloaded whole",
    "zero_optimization.offload_param.nvme_path": "offload to NVMe is not supported",
    "checkpoint.writer": "checkpoints are written through DeepSpeed's standard engine",
    "checkpoint.checkpoint_serialization": _NO_EFFECT,
    "checkpoint.parallel_write": _OTHER_PARALLELISM,
    "data_types.param_dtype": "use train.precision of the run's configuration",
    "data_types.buffer_dtype": _NUMERICS,
    "data_types.keep_in_fp32_modules": _NUMERICS,
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
    "bf16.check_grad_overflow": "",
}
"""Keys that a JSON may only repeat: the key of the run's configuration they follow from, or ""
where megalr relies on one value."""

OPTIONAL_KEYS: dict[str, tuple[str, ...]] = {
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "log_level": (),
}
"""Keys that are passed on when given but not written otherwise, with the keys below them."""
