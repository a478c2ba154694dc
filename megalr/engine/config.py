"""The DeepSpeed configuration of a run: the user's JSON completed, checked and made explicit.

DeepSpeed ignores misspelt top-level keys and its defaults move between versions, so
megalr refuses unknown keys and writes every value it relies on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalr.config.problems import printable, shown
from megalr.config.schema import RunConfig
from megalr.config.yaml_source import MAX_DEPTH, read_text
from megalr.engine.config_checks import (
    FIXED_KEYS,
    combination_problems,
    lay_over,
    model_problems,
)
from megalr.errors import UserError

NEVER = 1_000_000_000
"""Steps between two of DeepSpeed's own progress lines: more than any run has."""

BLOCK = "megalr.models.decoder.Block"
"""The class whose modules ZeRO 3 gathers whole, without hooks on the layers inside."""

PERSISTENT = 100_000
"""Elements up to which ZeRO 3 leaves a parameter whole on every rank: norms and biases. They cost
hardly any memory, and each would be copied out of the gathered block by a kernel of its own."""


def is_unwrapped(precision: str, stage: int) -> bool:
    """Whether the optimizer works on the model's own weights, without a wrapper of DeepSpeed's.

    So it is without ZeRO where weights and masters have one dtype: ``train.precision`` fp32 or
    paper_bf16.
    """
    return stage == 0 and precision != "bf16"


def read_deepspeed_json(path: Path | str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises UserError when it cannot be read, is not a JSON object, or gives a key twice.
    """

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"{path}: given twice: {', '.join(map(printable, twice))}; keep one of them"
            )
        return dict(pairs)

    text = read_text(Path(path), "the DeepSpeed JSON")
    try:
        values = json.loads(text, object_pairs_hook=no_key_twice)
        _check_depth(values, path)
    except RecursionError as error:
        raise UserError(f"{path}: not a DeepSpeed JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{path}: not a DeepSpeed JSON: {str(error).split(';')[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {shown(values)}: must be a JSON object")
    return values


def reopened(resolved: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What of a complete configuration of a run (``ds_config.json``) a user could have given.

    The values that follow from the run (batch sizes, precision) are dropped, so that they can
    change with the run and the number of its ranks.
    """
    return {
        name: reopened(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in resolved.items()
        if f"{prefix}{name}" not in FIXED_KEYS
    }


def _check_depth(values: Any, path: Path | str) -> None:
    level, depth = [values], 0
    while level := [
        item
        for value in level
        if isinstance(value, dict | list)
        for item in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{path}: not a DeepSpeed JSON: nested more than {MAX_DEPTH} deep")


def solve_batch(config: RunConfig, data_parallel_size: int) -> int:
    """Gradient accumulation steps that make global = micro x accumulation x data_parallel_size.

    Raises UserError with the numbers, and the nearest values that work, when there are none.
    """
    train = config.train
    share = train.micro_batch_size * data_parallel_size
    given = train.gradient_accumulation
    if given is not None and given * share != train.global_batch_size:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size}: differs from "
            f"train.micro_batch_size {train.micro_batch_size} x train.gradient_accumulation "
            f"{given} x {data_parallel_size} data-parallel ranks = {given * share}; "
            "leave train.gradient_accumulation out to have it computed"
        )
    if train.global_batch_size % share == 0:
        return train.global_batch_size // share
    lower = train.global_batch_size // share * share
    totals = f"{lower} or {lower + share}" if lower else f"{share}"
    per_rank = train.global_batch_size / data_parallel_size
    remedy = f"nearest train.global_batch_size: {totals}"
    if per_rank.is_integer():
        micro = [m for m in range(1, int(per_rank) + 1) if per_rank % m == 0]
        close = sorted(micro, key=lambda m: abs(m - train.micro_batch_size))[:2]
        remedy += f"; or train.micro_batch_size: {' or '.join(map(str, sorted(close)))}"
    raise UserError(
        f"train.global_batch_size = {train.global_batch_size}: is no multiple of "
        f"train.micro_batch_size {train.micro_batch_size} x {data_parallel_size} data-parallel "
        f"ranks = {share}; {remedy}"
    )


def resolve_deepspeed_config(
    config: RunConfig, user: dict[str, Any], source: str, data_parallel_size: int
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    ``user`` holds the user's JSON ({} = ZeRO off) and ``source`` its name in messages;
    "auto" stands for the value that megalr would write. ``data_parallel_size`` is the number of
    ranks that see different data. Nothing is read from or written to disk.

    Raises UserError with one line per problem.
    """
    problems: list[str] = []
    zero = user.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = 0 if zero.get("stage") in (None, "auto") else zero["stage"]
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"{source}: zero_optimization.stage = {shown(stage)}: must be 0, 1, 2 or 3")
        stage = 0
    accumulation = 1
    try:
        accumulation = solve_batch(config, data_parallel_size)
    except UserError as error:
        problems.append(str(error))
        user = {key: value for key, value in user.items() if key != "gradient_accumulation_steps"}
    user = {**user, "zero_optimization": {**zero, "stage": stage}} if zero else user
    resolved = _template(config, stage, accumulation)
    resolved["zero_optimization"] |= _offload_template(zero)
    if stage == 3:
        resolved["zero_optimization"] |= _gathers(config, zero)
    found = lay_over(resolved, user, config)
    resolved["steps_per_print"] = min(resolved["steps_per_print"], NEVER)
    found += model_problems(resolved)
    if not problems and not found:
        found = combination_problems(config, resolved)
    problems += [f"{source}: {problem}" for problem in found]
    if problems:
        raise UserError("\n".join(problems))
    return resolved


def describe_deepspeed(config: RunConfig, user: dict[str, Any], source: str) -> tuple[int, str]:
    """(ZeRO stage, the complete DeepSpeed configuration as lines of YAML comments).

    For use without a launcher: the number of ranks is the one that the accumulation given in the
    configuration or the JSON implies, else 1.

    Raises UserError as :func:`resolve_deepspeed_config`.
    """
    train = config.train
    given = train.gradient_accumulation or user.get("gradient_accumulation_steps")
    step = train.micro_batch_size * given if type(given) is int and given > 0 else 0
    ranks = train.global_batch_size // step if step and train.global_batch_size % step == 0 else 1
    resolved = resolve_deepspeed_config(config, user, source, ranks)
    title = f"DeepSpeed configuration on {ranks} data-parallel rank{'s'[: ranks - 1]}:"
    lines = [title, *json.dumps(resolved, indent=2).splitlines()]
    return resolved["zero_optimization"]["stage"], "\n".join(f"# {line}" for line in lines)


def _template(config: RunConfig, stage: int, accumulation: int) -> dict[str, Any]:
    """Every value megalr relies on or chooses, before the user's JSON is laid over it."""
    precision = config.train.precision
    low = precision != "fp32"
    wrapped = low and not is_unwrapped(precision, stage)
    pure = wrapped and precision == "paper_bf16"
    full_accumulation = not low or (precision == "bf16" and stage > 0)
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.gradient_clipping,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "managed_gradient_accumulation": True,
        "communication_data_type": "bf16" if low else "fp32",
        "data_types": {"grad_accum_dtype": "fp32" if full_accumulation else "bf16"},
        "bf16": {
            "enabled": wrapped,
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": pure,
            "bf16_optimizer_states": pure,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_optimization": _zero_template(stage),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {
            "tag_validation": "Fail",
            "load_universal": False,
            "use_node_local_storage": False,
        },
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


def _zero_template(stage: int) -> dict[str, Any]:
    """ZeRO options. The buckets are a tenth of DeepSpeed's, which would take 1 GB of bf16 each."""
    values: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 200_000_000,
        "use_multi_rank_bucket_allreduce": True,
        "overlap_comm": stage >= 2,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "compute_grad_norm": True,
        "enable_sanity_checks": False,
    }
    if stage == 3:
        values |= {
            "sub_group_size": 1_000_000_000,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_module_granularity_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "memory_efficient_linear": False,
            "override_module_apply": True,
            "log_trace_cache_warnings": False,
        }
    return values


def _gathers(config: RunConfig, user: dict[str, Any]) -> dict[str, Any]:
    """How ZeRO 3 gathers weights: a block in one message, and the next block meanwhile.

    DeepSpeed prefetches when a module with hooks starts, and blocks are the smallest such modules:
    fewer elements than a block's would leave the rest of the next one to be waited for, more would
    make each prefetch run further ahead of the computation than the one before.
    """
    threshold = user.get("stage3_param_persistence_threshold")
    threshold = threshold if type(threshold) is int else PERSISTENT
    return {
        "leaf_module": {"classes": [BLOCK], "names": [], "name_suffixes": []},
        "stage3_prefetch_bucket_size": _gathered_elements(config, threshold),
    }


def _gathered_elements(config: RunConfig, threshold: int) -> int:
    """Elements of the largest block's parameters of more than ``threshold``.

    A size of DeepSpeed's where the blocks are not known yet: for a pretrained model before its
    folder was read, or for sizes that do not fit each other, which building the model reports.
    """
    import torch

    from megalr.models.build import build_decoder, sizes_of

    try:
        sizes = sizes_of(config)
        if getattr(config.method, "ranks", None) is None:  # all blocks are equal
            sizes = replace(sizes, num_layers=1)
        with torch.device("meta"):
            decoder = build_decoder(sizes, config.method, config.run.seed, initialize=False)
    except UserError:
        return 50_000_000
    blocks = [[p.numel() for p in block.parameters()] for block in decoder.blocks()]
    return max(sum(numel for numel in block if numel > threshold) for block in blocks)


def _offload_template(zero: dict[str, Any]) -> dict[str, Any]:
    """The values of the offload sections that the user has asked for."""
    values: dict[str, Any] = {}
    if isinstance(zero.get("offload_optimizer"), dict):
        values["offload_optimizer"] = {
            "device": "none",
            "pin_memory": True,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
        }
    if isinstance(zero.get("offload_param"), dict):
        values["offload_param"] = {"device": "none", "pin_memory": True}
    return values
