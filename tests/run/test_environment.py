"""The ranks run the same code, configuration and data, or none of them runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megalr.config.schema import RunConfig
from megalr.distributed.peer_errors import name_lost_peers
from megalr.errors import AgreedError, PeerLost
from megalr.run import environment
from megalr.run.environment import (
    check_ranks_agree,
    commit,
    report,
    slow_precision,
    source_hash,
)
from megalr.version import __version__
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import settings

ROOT = Path(__file__).resolve().parents[2]


def _check(values: dict[str, Any], changed: dict[str, Any]) -> str:
    """What the ranks say when rank 1, on another host, has ``changed`` things."""
    import torch.distributed as dist

    own = changed if dist.get_rank() == 1 else {}
    config = RunConfig.model_validate({**values, "optimizer": {"lr": own.get("lr", 0.01)}})
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURMD_NODENAME", f"gpu{dist.get_rank()}")
    if "source" in own:
        patch.setattr(environment, "source_hash", lambda: own["source"])
    try:
        ds_config = {"zero_optimization": {"stage": own.get("stage", 1)}}
        check_ranks_agree(config, ds_config, own.get("data", "aaaa1111"))
    except AgreedError as error:
        return str(error)
    finally:
        patch.undo()
    return "fine"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({}, None),
        (
            {"source": "0123456789abcdef"},
            f"megalr {__version__} with source 0123456789ab here, {__version__} with",
        ),
        ({"lr": 0.02}, "optimizer.lr 0.02 here, 0.01 there; give every rank the same files"),
        ({"stage": 2}, "zero_optimization.stage 2 here, 1 there"),
        ({"data": "bbbb2222"}, "fingerprint of data.train bbbb2222 here, aaaa1111 there; copy"),
    ],
)
def test_a_rank_that_differs_is_named_with_both_values_on_all_ranks(
    changed: dict[str, Any], message: str | None
) -> None:
    first, second = run_distributed(_check, 2, settings(Path("run"), Path("data")), changed)
    assert first == second
    if message is None:
        assert first == "fine"
    else:
        assert first.startswith("rank 1 on gpu1: differs from rank 0 on gpu0: ")
        assert message in first


def _report() -> str:
    import torch
    import torch.distributed as dist

    os.environ["SLURMD_NODENAME"] = f"gpu{dist.get_rank() // 2}"
    try:
        return report(torch.device("cpu"))
    finally:
        del os.environ["SLURMD_NODENAME"]


def test_the_report_says_what_runs_where() -> None:
    lines = run_distributed(_report, 3)[0].splitlines()
    assert len(lines) == 5 and all(line.startswith("[environment] ") for line in lines)
    assert f"source {source_hash()[:12]}" in lines[0] and "deepspeed 0." in lines[0]
    assert "ranks 3 on 2 hosts: gpu0 (ranks 0-1: 2 x " in lines[1]
    assert "; gpu1 (ranks 2: 1 x " in lines[1]
    assert "backend gloo" in lines[2]


def test_the_commit_is_git_s() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(commit().removesuffix("+changes"))


def _lose_rank_one() -> str:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os._exit(9)
    with name_lost_peers(60):
        for _ in range(3):  # the first may still find the connection open
            dist.all_reduce(torch.ones(1))
    return "not reached"


def test_the_collective_that_a_dead_rank_leaves_unanswered_is_named() -> None:
    with pytest.raises(RankFailed, match=r"PeerLost: rank 0 on .*: all_reduce got no answer"):
        run_distributed(_lose_rank_one, 2)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), name_lost_peers(60):
        raise RuntimeError("shapes differ")
    with pytest.raises(PeerLost, match="a collective got no answer"), name_lost_peers(60):
        raise RuntimeError("[x.cc:1] Timed out waiting 5000ms for recv operation\nhint")


@pytest.mark.parametrize(
    ("device", "precision", "warned"),
    [
        ("cpu", "bf16", True),
        ("cpu", "paper_bf16", True),
        ("cpu", "fp32", False),
        ("cuda", "bf16", False),
    ],
)
def test_half_precision_on_a_processor_is_warned_of_in_one_line(
    device: str, precision: str, warned: bool
) -> None:
    line = slow_precision(torch.device(device), precision)
    assert (line is not None) == warned
    assert line is None or ("train.precision=fp32" in line and "\n" not in line)
