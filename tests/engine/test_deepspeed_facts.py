"""What megalr takes for granted about the installed DeepSpeed; docs/dev/deepspeed-notes.md has it.

A failure here means that DeepSpeed has changed: read the note again and decide anew.
"""

from __future__ import annotations

import inspect
import io
import math
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from megalr.config import load_run_config
from megalr.engine.config import read_deepspeed_json, resolve_deepspeed_config
from megalr.engine.config_checks import FIXED_KEYS, OPTIONAL_KEYS, REFUSED_KEYS
from megalr.estimate.states import ALLREDUCE_ELEMENTS
from tests.ranks import run_distributed

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
RUN = [
    "run.dir=x",
    "model.preset=llama_9m",
    "optimizer.lr=1e-2",
    "data.train=d",
    "train={updates: 3, global_batch_size: 8, micro_batch_size: 2}",
]


class RecordingDict(dict):
    """A dictionary that remembers which keys it was asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def resolved(name: str, precision: str, ranks: int = 2) -> dict[str, Any]:
    config = load_run_config([], [*RUN, f"train.precision={precision}"])
    return resolve_deepspeed_config(
        config, read_deepspeed_json(DS_CONFIGS / f"{name}.json"), name, ranks
    )


def test_every_top_level_key_that_deepspeed_reads_is_known_to_us_and_the_other_way_round() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    sizes = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
    DeepSpeedConfig(RecordingDict(sizes, gradient_accumulation_steps=1))
    ours = set(resolved("zero3_offload", "bf16"))
    ours |= {key.partition(".")[0] for key in (*FIXED_KEYS, *OPTIONAL_KEYS, *REFUSED_KEYS)}
    assert RecordingDict.asked == ours - {"sequence_parallel_size"}  # read in processes with ranks


def test_nested_keys_we_refuse_or_fix_exist_in_deepspeed() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    bf16 = set(DeepSpeedBF16Config.model_fields)
    for key in (*REFUSED_KEYS, *FIXED_KEYS):
        section, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if section == "zero_optimization" and name:
            assert name in zero or name in _REMOVED_ZERO_CONFIG_KEYS, key
        if section == "bf16" and name:
            assert name in bf16, key
    assert set(resolved("zero1", "bf16")["bf16"]) == bf16
    assert set(resolved("zero3_offload", "bf16")["zero_optimization"]) <= zero


def test_deepspeed_takes_a_misspelt_top_level_key_in_silence() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimizationn": {"stage": 2}})
    assert config.zero_optimization_stage == 0


def test_defaults_that_megalr_overrides_are_still_what_the_notes_say() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig({"train_batch_size": 1})
    assert config.gradient_clipping == 1.0
    assert config.timers_config.enabled and config.timers_config.synchronized
    assert config.zero_config.reduce_bucket_size == 500_000_000
    assert config.zero_config.memory_efficient_linear is True
    assert config.zero_force_ds_cpu_optimizer is True
    assert config.zero_allow_untested_optimizer is False
    assert config.checkpoint_tag_validation_enabled and not config.checkpoint_tag_validation_fail


OFFLOADED = "1 + CPU offload"
COMBINATIONS = [
    # precision, stage, grad_accum_dtype, optimizer wrapper (None: not legal)
    ("bf16", "0", "bf16", "ddp_bf16"),
    ("bf16", "0", "fp32", None),
    ("bf16", "1", "fp32", "bf16"),
    ("bf16", "1", "bf16", "zero_optimization"),
    ("bf16", OFFLOADED, "fp32", "zero_optimization"),
    ("bf16", OFFLOADED, "bf16", "zero_optimization"),
    ("bf16", "2", "fp32", "zero_optimization"),
    ("bf16", "2", "bf16", "zero_optimization"),
    ("bf16", "3", "fp32", "zero_optimization"),
    ("bf16", "3", "bf16", "zero_optimization"),
    ("fp32", "0", "fp32", "plain"),
    ("fp32", "0", "bf16", None),
    ("fp32", "1", "fp32", "zero_optimization"),
    ("fp32", "2", "fp32", "zero_optimization"),
    ("fp32", "3", "fp32", "zero_optimization"),
]


@pytest.mark.parametrize(("precision", "stage", "accumulate", "wrapper"), COMBINATIONS)
def test_optimizer_wrapper_of_each_precision_stage_and_accumulation_type(
    precision: str,
    stage: str,
    accumulate: str,
    wrapper: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from deepspeed.runtime import engine as engine_module
    from deepspeed.runtime.engine import DeepSpeedEngine

    monkeypatch.setattr(engine_module, "is_zero_supported_optimizer", lambda optimizer: True)

    engine = SimpleNamespace(
        global_rank=1,
        pipeline_parallelism=False,
        fp16_enabled=lambda: False,
        bfloat16_enabled=lambda: precision == "bf16",
        zero_optimization=lambda: int(stage[0]) > 0,
        zero_optimization_stage=lambda: int(stage[0]),
        zero_allow_untested_optimizer=lambda: True,
        zero_cpu_offload=lambda: stage == OFFLOADED,
        zero_compute_grad_norm=lambda: True,
        _config=SimpleNamespace(grad_accum_dtype=accumulate),
    )
    engine.get_data_types = lambda: DeepSpeedEngine.get_data_types(engine)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    if wrapper is None:
        with pytest.raises(NotImplementedError):
            DeepSpeedEngine._do_optimizer_sanity_check(engine, optimizer)
    else:
        chosen = DeepSpeedEngine._do_optimizer_sanity_check(engine, optimizer)
        assert (chosen or "plain") == wrapper


def probe_engines(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per config: wrapper class, loss after one update, Adam's step counter after building, whether
    the weights survive a gradient that is not a number, and the engine's counters and norm then."""
    import deepspeed
    import torch

    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        steps = [int(state["step"]) for state in optimizer.state.values()]
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        loss = torch.zeros(())
        for micro in range(2 * config["gradient_accumulation_steps"]):
            generator = torch.Generator().manual_seed(micro % 2)
            loss = engine(torch.randn(2, 8, generator=generator).to(dtype)).float().square().mean()
            engine.backward(loss)
            engine.step()
        for _ in range(config["gradient_accumulation_steps"]):
            engine.backward(engine(torch.ones(2, 8, dtype=dtype)).sum() * float("nan"))
            engine.step()
        finite = bool(torch.isfinite(engine(torch.ones(2, 8, dtype=dtype))).all())
        found[name] = (
            type(engine.optimizer).__name__,
            float(loss.detach()),
            max(steps, default=0),
            finite,
            (engine.global_steps, engine.skipped_steps, engine.get_global_grad_norm()),
        )
        engine.destroy()
    return found


def test_engines_of_shipped_configs_make_the_update_of_plain_adamw_and_skip_nan() -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for micro in range(4):
        generator = torch.Generator().manual_seed(micro % 2)
        loss = model(torch.randn(2, 8, generator=generator)).square().mean()
        (loss / 2).backward()
        if micro == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    names = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    configs = {f"fp32 {name}": resolved(name, "fp32") for name in names}
    configs |= {f"bf16 {name}": resolved(name, "bf16") for name in names}
    configs |= {
        f"paper {name}": resolved(name, "paper_bf16") for name in ("paper_bf16", "zero2", "zero3")
    }
    found = run_distributed(probe_engines, 2, configs)[0]
    stage_3 = "DeepSpeedZeroOptimizer_Stage3"
    wrappers = {
        "fp32 zero0": "AdamW",
        "bf16 zero0": "FP16_UnfusedOptimizer",
        "bf16 zero1": "BF16_Optimizer",
    }
    for name, (wrapper, after, steps_before, survives, (steps, skipped, norm)) in found.items():
        expected = wrappers.get(name, stage_3 if "zero3" in name else "DeepSpeedZeroOptimizer")
        assert wrapper == expected, name
        assert survives == (name != "fp32 zero0"), name
        # A skipped update counts as a step; the norm says that it was one.
        assert (steps, skipped) == (3, int(survives)), name
        assert math.isinf(norm) if survives else norm is None, (name, norm)
        if name == "bf16 zero0":
            # The wrapper takes a step with zero gradients when it is built: Adam's bias
            # correction then starts at 2 and the first update is a quarter smaller.
            assert steps_before == 1
            continue
        assert steps_before == 0, name
        tolerance = 1e-5 if name.startswith("fp32") else 5e-3
        assert abs(after - float(loss.detach())) < tolerance, (name, after)


def test_options_that_deepspeed_parses_but_never_uses() -> None:
    """The reason why they are refused: setting them would do nothing."""
    import deepspeed

    root = Path(deepspeed.__file__).parent / "runtime"
    words: dict[str, set[str]] = {}
    for name in ("engine.py", "zero/stage_1_and_2.py", "zero/stage3.py", "bf16_optimizer.py"):
        source = (root / name).read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        words[name] = {token.string for token in tokens if token.type == tokenize.NAME}
    assert not any("disable_allgather" in found for found in words.values())
    assert not any("vocabulary_size" in found for found in words.values())
    assert [n for n, found in words.items() if "allgather_partitions" in found] == ["engine.py"]


def test_what_megalr_turns_off_or_replaces_in_the_engine_is_still_what_it_calls() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "self.clip_fp32_gradients()" in inspect.getsource(DeepSpeedEngine._take_model_step)
    assert "self.enable_backward_allreduce" in inspect.getsource(DeepSpeedEngine)
    reduce = inspect.signature(DeepSpeedEngine.buffered_allreduce_fallback)
    assert reduce.parameters["elements_per_buffer"].default == ALLREDUCE_ELEMENTS


def test_pure_bf16_with_offload_needs_deepspeeds_own_adam() -> None:
    """The reason why paper_bf16 cannot be offloaded."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for wrapper in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        source = inspect.getsource(wrapper.__init__)
        assert "Master weights feature requires" in source and "DeepSpeedCPUAdam" in source


def test_bf16_without_zero_asks_the_gradients_for_the_mark_of_cut_parameters() -> None:
    """The reason for megalr's hook that marks them."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    source = inspect.getsource(FP16_UnfusedOptimizer.step)
    assert "get_weight_norm(grads_for_norm" in source


def test_muon_s_update_is_made_where_gradients_are_collected() -> None:
    """The reason why megalr does not use it: clipping would see the finished update."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "muon_update(" in inspect.getsource(DeepSpeedZeroOptimizer.get_flat_partition)


def test_what_the_launchers_hand_on_and_which_signals_they_hear() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher import launch, runner

    handed_on = [*runner.EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)]
    assert sorted(handed_on) == ["MLFLOW", "MV2", "NCCL", "PYTHON", "UCX"]
    assert runner.DEEPSPEED_ENVIRONMENT_PATHS[1:] == ["."]
    command = inspect.getsource(runner.main)  # with a host file only
    assert "if args.launcher == PDSH_LAUNCHER and multi_node_exec:\n        signal." in command
    assert command.count("signal.signal(") == 2
    child = inspect.getsource(launch)
    assert child.count("signal.signal(") == 2 and "SIGUSR1" not in child
    assert "timeout=30" in inspect.getsource(launch.terminate_process_tree)


def test_the_converter_to_universal_checkpoints_knows_adam_s_states_only() -> None:
    from deepspeed.checkpoint import ds_to_universal

    source = inspect.getsource(ds_to_universal)
    assert source.count('for state in ("fp32", "exp_avg", "exp_avg_sq")') == 2
