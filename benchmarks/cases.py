"""Runs that benchmarks/throughput.py and benchmarks/profile_step.py measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megalr.models.recompute import LEVELS


@dataclass(frozen=True)
class Case:
    """One measured run.

    ``stage`` None: 1, and 0 where DeepSpeed needs no wrapper for the precision (paper_bf16).
    ``zero``: more keys of ``zero_optimization``. ``sequence``: tokens of each of the
    ``micro_batch`` sequences.
    """

    preset: str
    method: dict[str, Any]
    micro_batch: int
    precision: str = "bf16"
    stage: int | None = None
    accumulation: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3})
    tensor: int = 1
    layout: str = "auto"
    restarts: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    sequence: int = 256


LOW_60 = {"name": "low_rank", "rank": 128, "alpha": 32.0}
LOW_350 = {"name": "low_rank", "rank": 256, "alpha": 32.0}
LOW_1B = {"name": "low_rank", "rank": 512, "alpha": 32.0}
LOW_7B = {"name": "low_rank", "rank": 1024, "alpha": 32.0}
FULL = {"name": "full_rank"}
SPARSE_350 = {"name": "sltrain", "rank": 256, "alpha": 16.0, "density": 0.03}
SPARSE_1B = {"name": "sltrain", "rank": 512, "alpha": 8.0, "density": 0.03}
PAPER = "paper_bf16"
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
OFTEN = {"every": 8}
PLAIN = {"compile": False, "cuda_graphs": False, "kernels": "torch"}


def at_length(case: Case, sequence: int) -> Case:
    """The case with sequences of this length and as many tokens a micro-batch, or one sequence."""
    rows = max(1, case.micro_batch * case.sequence // sequence)
    return replace(case, sequence=sequence, micro_batch=rows)


def keeping(level: str) -> dict[str, Any]:
    """Settings of a level of activation checkpointing."""
    return {"activation_checkpointing": level}


def level_cases(name: str, case: Case) -> dict[str, Case]:
    """The case with every level of activation checkpointing."""
    return {
        f"{name}_{level}": replace(case, train=keeping(level))
        for level in LEVELS
        if level != "none"
    }


def tensor_cases(preset: str, low_rank: dict[str, Any]) -> dict[str, Case]:
    """A size under tensor parallelism: dense and both layouts; ``--tensor`` changes the 2."""
    name = preset.removeprefix("llama_")
    case = Case(preset, low_rank, 64, accumulation=4, tensor=2)
    return {
        f"{name}_low_rank_column_row": replace(case, layout="column_row"),
        f"{name}_low_rank_cut": replace(case, layout="bottleneck"),
        f"{name}_full_rank_tensor": replace(case, method=FULL),
    }


def sharded_cases() -> dict[str, Case]:
    """Models whose weights are divided over the GPUs (ZeRO 3), or whose optimizer is in the host's
    memory: neither can be a CUDA graph. Of 13B and 7B full_rank whole blocks are recomputed."""
    train = {"cuda_graphs": False}
    low = Case("llama_1b", LOW_1B, 64, stage=3, train=train)
    recomputed = {"cuda_graphs": False, **keeping("full")}
    return {
        "1b_low_rank_zero3": low,
        "1b_low_rank_zero3_plain": replace(low, train={**train, "compile": False}),
        "1b_low_rank_offload": replace(low, stage=2, zero=OFFLOAD),
        **{
            f"{size}_full_rank_zero3": Case(f"llama_{size}", FULL, 16, stage=3, train=recomputed)
            for size in ("1b", "7b", "13b")
        },
    }


def method_cases(preset: str, rank: int) -> dict[str, Case]:
    """Every method at a size, on the micro-batch of the published figures."""
    factors = {"rank": rank, "alpha": 32.0}
    projected = {"rank": rank, "update_proj_gap": 200}
    methods: dict[str, dict[str, Any]] = {
        "lora": {"name": "lora", **factors},
        "relora": {"name": "relora", "merge_every": 50, **factors},
        "cola": {"name": "cola", "rank": rank},
        "galore": {"name": "galore", "scale": 0.25, **projected},
        "fira": {"name": "fira", "scale": 0.25, **projected},
        "apollo": {"name": "apollo", **projected},
        "apollo_mini": {"name": "apollo_mini", "update_proj_gap": 200},
        "golore": {"name": "golore", **projected},
        "loro": {"name": "loro", "rank": rank},
    }
    cases = {name: Case(preset, method, 64) for name, method in methods.items()}
    for name in ("spam", "stable_spam", "muon", "scale"):
        optimizer = {"name": name, "lr": 1e-3}
        cases[name] = Case(preset, FULL, 64, optimizer=optimizer)
    for name, kind in (("dion2", "muon"), ("normuon", "normuon"), ("nordion2", "normuon")):
        optimizer = {"name": kind, "lr": 1e-3}
        optimizer |= {} if name == kind else {"fraction": 0.25}
        cases[name] = Case(preset, FULL, 64, optimizer=optimizer)
    product = {"name": "low_rank", "rank": rank, "alpha": float(rank), "init": "orthogonal"}
    cases["spectron"] = Case(preset, product, 64, optimizer={"name": "spectron", "lr": 1e-2})
    return {f"{preset.removeprefix('llama_')}_{name}": case for name, case in cases.items()}


CASES: dict[str, Case] = {
    "60m_low_rank": Case("llama_60m", LOW_60, 128),
    "60m_low_rank_paper": Case("llama_60m", LOW_60, 128, PAPER),
    "60m_low_rank_paper_plain": Case("llama_60m", LOW_60, 128, PAPER, train=PLAIN),
    "60m_low_rank_plain": Case("llama_60m", LOW_60, 128, train=PLAIN),
    "60m_full_rank": Case("llama_60m", FULL, 128),
    "350m_low_rank": Case("llama_350m", LOW_350, 64),
    "350m_low_rank_paper": Case("llama_350m", LOW_350, 64, PAPER),
    "350m_full_rank": Case("llama_350m", FULL, 64),
    "350m_sltrain": Case("llama_350m", SPARSE_350, 64),
    "1b_low_rank": Case("llama_1b", LOW_1B, 64),
    "1b_low_rank_paper": Case("llama_1b", LOW_1B, 64, PAPER),
    **level_cases("1b_low_rank_paper", Case("llama_1b", LOW_1B, 64, PAPER)),
    "1b_full_rank": Case("llama_1b", FULL, 64),
    "1b_full_rank_paper": Case("llama_1b", FULL, 64, PAPER),
    "1b_full_rank_paper_elementwise": Case(
        "llama_1b", FULL, 64, PAPER, train=keeping("elementwise")
    ),
    "1b_sltrain": Case("llama_1b", SPARSE_1B, 64),
    "1b_sltrain_paper": Case("llama_1b", SPARSE_1B, 64, PAPER),
    "1b_sltrain_paper_elementwise": Case(
        "llama_1b", SPARSE_1B, 64, PAPER, train=keeping("elementwise")
    ),
    "60m_restarts": Case("llama_60m", LOW_60, 128, PAPER, accumulation=4, restarts=OFTEN),
    "1b_restarts": Case("llama_1b", LOW_1B, 64, PAPER, accumulation=8, restarts=OFTEN),
    "7b_low_rank": Case("llama_7b", LOW_7B, 32, accumulation=8),
    **tensor_cases("llama_7b", LOW_7B),
    **tensor_cases("llama_1b", LOW_1B),
    **sharded_cases(),
    **method_cases("llama_350m", 256),
    **method_cases("llama_1b", 512),
}


def stage_of(case: Case) -> int:
    """ZeRO stage of a case."""
    if case.stage is not None:
        return case.stage
    return 0 if case.precision == PAPER else 1
