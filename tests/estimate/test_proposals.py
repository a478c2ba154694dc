"""Proposals fit, keep the run's batch, are the fastest of their kind, and can be typed."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalr.cli.main import main
from megalr.cli.train import pretrain_command
from megalr.config.loading import load_run_config
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.estimate.cluster import H200
from megalr.estimate.memory import GIB, estimate_memory
from megalr.estimate.proposals import SLOWER_AT_3, memory_size, proposals
from megalr.estimate.tensors import plan_of
from megalr.estimate.update_time import SPEEDS, Job, predict
from megalr.models.build import sizes_of
from megalr.models.config import PRESETS
from tests.training.runs import zero
from tests.training.test_methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
LLAMA_7B = ("--config", "llama_7b", "--gpus", "8")


def _recipe(name: str, *overrides: str) -> RunConfig:
    return load_run_config([ROOT / "recipes" / f"{name}.yaml"], overrides, presets=PRESETS)


@pytest.mark.parametrize(
    "text, size",
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("24", 24 * 2**30), ("0.5 gib", 2**29)],
)
def test_sizes_of_gpus(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["24TB", "0", "-3", "", "GiB", "24 GiB of", "1e400", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--fit .*must be the memory of a GPU") as error:
        memory_size(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, gpus", [("llama_7b_low_rank", 8), ("llama_350m", 2)])
def test_proposals_fit_keep_the_batch_and_come_by_speed(name: str, gpus: int) -> None:
    config, room = _recipe(name), 24 * GIB
    found = proposals(config, room, gpus)
    assert found
    kinds = [(way.config.parallel.tensor, way.stage) for way in found]
    assert len(set(kinds)) == len(kinds)
    assert [way.seconds for way in found] == sorted(way.seconds for way in found)
    for way in found:
        train, tensor = way.config.train, way.config.parallel.tensor
        again = estimate_memory(way.config, zero(way.stage), "x", gpus)
        assert again == way.estimate and again.needed <= room
        assert train.global_batch_size == config.train.global_batch_size
        assert train.global_batch_size % (train.micro_batch_size * gpus // tensor) == 0
        tokens = train.global_batch_size * config.data.sequence_length
        assert way.tokens_per_second == pytest.approx(tokens / way.seconds)


def test_nothing_that_fits_is_faster() -> None:
    config, room, gpus = _recipe("llama_1b_low_rank"), 20 * GIB, 2
    sizes, share = sizes_of(config), config.train.global_batch_size // 2
    proposed = {way.stage: way.seconds for way in proposals(config, room, gpus, tensor=1)}
    for stage in (0, 1, 2):
        times = []
        for micro in (m for m in range(1, share + 1) if share % m == 0):
            for level in ("none", "elementwise", "mlp", "bottleneck", "full"):
                train = {"micro_batch_size": micro, "activation_checkpointing": level}
                changed = config.model_copy(update={"train": config.train.model_copy(update=train)})
                if estimate_memory(changed, zero(stage), "x", gpus).needed <= room:
                    job = Job(
                        sizes,
                        config.method,
                        micro,
                        256,
                        share // micro,
                        plan_of(sizes, config.method, 1, "auto"),
                        2,
                        stage,
                        level,
                        clipping=True,
                        compiled=config.train.compile,
                    )
                    times.append(predict(job, SPEEDS, H200).total)
        assert proposed[stage] == pytest.approx(min(times), rel=0.01)
    assert SLOWER_AT_3 > 1 and 3 in proposed


def test_levels_of_recomputation_cost_what_was_recorded() -> None:
    """1B low-rank on one H200, by ``none``: to 2 % of its speed."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "throughput_1gpu.json").read_text())
    speed: dict[str, float] = {}
    for row in rows:
        level = re.fullmatch(r"1b_low_rank_paper(?:_(\w+))?", row["case"])
        if level and row["commit"] == "8034529":  # the session that made them all
            speed.setdefault(level[1] or "none", row["tokens_per_second"])
    config = _recipe("llama_1b_low_rank")
    times = {
        level: predict(
            Job(sizes_of(config), config.method, 64, 256, stage=0, recompute=level), SPEEDS, H200
        ).total
        for level in speed
    }
    assert set(speed) == {"none", "elementwise", "mlp", "bottleneck", "full"}
    for level, tokens in speed.items():
        expected = tokens / speed["none"]
        assert times["none"] / times[level] == pytest.approx(expected, abs=0.02), level


@pytest.mark.parametrize(
    "name, overrides, stages, tensors",
    [
        ("galore", [], {1, 2, 3}, {1}),  # whole matrices need ZeRO, and are not cut
        ("relora", [], {0, 1, 2}, {1, 2}),  # ZeRO 3 would cut what is merged
        ("full_rank", ["optimizer.name=muon"], {0, 1, 2, 3}, {1, 2}),
        ("sltrain", [], {0, 1, 2, 3}, {1, 2}),
        ("cola", ["train.precision=paper_bf16"], {0, 1, 2, 3}, {1, 2}),
    ],
)
def test_what_a_method_cannot_do_is_not_proposed(
    name: str, overrides: list[str], stages: set[int], tensors: set[int]
) -> None:
    base = _recipe("llama_60m" if name == "full_rank" else "llama_60m_low_rank", *overrides)
    values = base.model_dump()
    if name != "full_rank":
        values |= {key: part for key, part in METHODS[name].items() if key == "method"}
    found = proposals(RunConfig.model_validate(values), 24 * GIB, 2)
    assert {way.stage for way in found} == stages
    assert {way.config.parallel.tensor for way in found} == tensors


def test_what_does_not_fit_is_one_line_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"nothing fits 24\.0 GiB: the smallest run needs") as error:
        proposals(_recipe("llama_7b"), 24 * GIB, 1)
    assert "more GPUs" in str(error.value) and "\n" not in str(error.value)
    config = _recipe("llama_60m", "train.global_batch_size=512")
    with pytest.raises(UserError, match="global_batch_size 512 on 7 GPUs: there is no way"):
        proposals(config, 24 * GIB, 7)
    for gpus, tensor in ((0, None), (8, 3), (8, 0)):
        with pytest.raises(UserError, match=f"{gpus} GPUs cannot be cut into"):
            proposals(config, 24 * GIB, gpus, tensor)


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["memory", *words])
    return capsys.readouterr().out


def test_what_is_printed_can_be_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = "llama_7b_low_rank"
    fit = ["--config", recipe, "--gpus", "2", "--fit", "60GiB", "train.compile=true"]
    ways: list[dict[str, Any]] = json.loads(_printed(capsys, *fit, "--json"))
    lines = _printed(capsys, *fit).splitlines()
    assert max(map(len, lines)) <= 80 and len(ways) <= 8
    typed = [line.strip() for line in lines[2:]]
    starts = [i for i, line in enumerate(typed) if re.match(r"\d\. ", line)] + [len(typed)]
    printed = list(zip(ways, itertools.pairwise(starts), strict=True))
    slowest = {way["zero_stage"]: (way, lines) for way, lines in printed}  # of each stage
    assert sorted(slowest) == [0, 1, 2, 3]
    for way, (first, end) in slowest.values():
        words = " ".join(typed[first + 1 : end])
        assert words == (" ".join(way["words"]) or "as configured")
        run = ["--config", recipe, "run.dir=x", "data.train=x", "train.compile=true", *way["words"]]
        pretrain_command([*run, "--print_config"])
        resolved = yaml.safe_load(capsys.readouterr().out)
        assert resolved["train"]["micro_batch_size"] == way["micro_batch_size"]
        assert resolved["parallel"]["tensor"] == way["tensor"]
        assert way["needed"] <= 60 * GIB
        # The estimate of the words is that of the proposal.
        again = json.loads(
            _printed(capsys, *fit[:4], "train.compile=true", *way["words"], "--json")
        )
        assert again["peak"] == way["peak"] == sum(again["parts"].values())


def test_parameters_and_refusals_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(_printed(capsys, *LLAMA_7B, "--json"))
    # LLaMA 7B as published: 6.738 billion with a vocabulary of 32,000.
    assert sum(found["parameters"].values()) == 6_738_415_616
    assert found["parameters"]["head"] == 32000 * 4096
    with pytest.raises(UserError, match="--deepspeed_config zero2 with --fit"):
        _printed(capsys, *LLAMA_7B, "--fit=24", "--deepspeed_config", "zero2")
