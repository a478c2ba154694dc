"""What megalr takes for granted about the installed DeepSpeed; docs/deepspeed-notes.md lists it.

A failure here means that DeepSpeed has changed: read the note again and decide anew.
"""

from __future__ import annotations

import io
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from megalr.config import load_run_config
from megalr.config.deepspeed import read_deepspeed_json, resolve_deepspeed_config
from megalr.config.deepspeed_keys import FIXED_KEYS, OPTIONAL_KEYS, REFUSED_KEYS
from tests.distributed import run_distributed

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


COMBINATIONS = [
    # precision, stage, grad_accum_dtype, optimizer wrapper (None: not legal)
    ("bf16", 0, "bf16", "ddp_bf16"),
    ("bf16", 0, "fp32", None),
    ("bf16", 1, "fp32", "bf16"),
    ("bf16", 1, "bf16", "zero_optimization"),
    ("bf16", 2, "fp32", "zero_optimization"),
    ("bf16", 2, "bf16", "zero_optimization"),
    ("bf16", 3, "fp32", "zero_optimization"),
    ("fp32", 0, "fp32", "plain"),
    ("fp32", 0, "bf16", None),
    ("fp32", 1, "fp32", "zero_optimization"),
]


@pytest.mark.parametrize(("precision", "stage", "accumulate", "wrapper"), COMBINATIONS)
def test_optimizer_wrapper_of_each_precision_stage_and_accumulation_type(
    precision: str,
    stage: int,
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
        zero_optimization=lambda: stage > 0,
        zero_optimization_stage=lambda: stage,
        zero_allow_untested_optimizer=lambda: True,
        zero_cpu_offload=lambda: False,
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
    """Per config: wrapper class, loss after one update, Adam's step counter after building, and
    whether the weights survive a gradient that is not a number."""
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
    for name, (wrapper, after, steps_before, survives) in found.items():
        expected = wrappers.get(name, stage_3 if "zero3" in name else "DeepSpeedZeroOptimizer")
        assert wrapper == expected, name
        assert survives == (name != "fp32 zero0"), name
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
