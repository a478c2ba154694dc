"""Runs with optimizers for whole matrices on a grid equal the run on one rank, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalr.checkpoint.reader import Checkpoint, open_checkpoint, open_source
from megalr.checkpoint.reshape import write_universal
from megalr.checkpoint.source import MASTER, whole
from megalr.optim import muon
from tests.checkpoint.test_shapes import EVERY, continued
from tests.ranks import run_distributed
from tests.training.runs import events, losses, run, settings, zero

LOW_RANK = {"name": "low_rank", "rank": 8, "alpha": 8.0}
ORTHOGONAL = {**LOW_RANK, "init": "orthogonal"}
FULL_RANK = {"name": "full_rank"}
SPECTRON = {"name": "spectron", "lr": 0.05}
DION2, NORDION2 = ({"name": n, "fraction": 0.25} for n in ("muon", "normuon"))
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "muon": {"method": FULL_RANK, "optimizer": {"name": "muon"}},
    "muon_factors": {"method": LOW_RANK, "optimizer": {"name": "muon"}},
    "dion2": {"method": FULL_RANK, "optimizer": DION2},
    "normuon": {"method": LOW_RANK, "optimizer": {"name": "normuon"}},
    "nordion2": {"method": FULL_RANK, "optimizer": NORDION2},
    "spectron": {"method": ORTHOGONAL, "optimizer": SPECTRON},
    "carried": {
        "method": LOW_RANK,
        "optimizer": {"name": "normuon"},
        "restarts": {"every": 4, "reset": "transport", "verify": True},
    },
    "carried_muon": {
        "method": LOW_RANK,
        "optimizer": {"name": "muon"},
        "restarts": {"every": 4, "reset": "transport", "verify": True},
    },
    "carried_spectron": {
        "method": LOW_RANK,
        "optimizer": SPECTRON,
        "restarts": {"every": 4, "reset": "transport", "verify": True},
    },
    "lr_transfer": {
        "method": {**LOW_RANK, "lr_transfer": {"base_width": 24, "base_rank": 4}},
        "optimizer": {"weight_decay": 0.1, "eps": 1e-4},
    },
}


def run_in_float32(values: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """A run whose Newton-Schulz iteration is float32: fp16 makes 1e-3 of the last digit."""
    with mock.patch.object(muon, "_gram_dtype", lambda device: torch.float32):
        run(values, ds_config)


def _run(
    folder: Path, data: Path, case: str, tensor: int = 1, layout: str = "auto", ranks: int = 1,
    stage: int = 1,
) -> list[float]:  # fmt: skip
    """Losses, gradient norms and validation loss of a run; one in ``folder`` is continued."""
    sections = {"restarts": {"every": 4, "verify": True}, **CASES[case]}
    if sections["method"] is FULL_RANK:
        del sections["restarts"]
    values = settings(
        folder,
        data,
        **sections,
        model={"num_kv_heads": 4, "num_layers": 1},
        parallel={"tensor": tensor, "layout": layout},
        data={"sequence_length": 16},
        train={"updates": 8, "global_batch_size": 4, "micro_batch_size": 2},
        evaluation={"every": 0, "tokens": 100},
        **EVERY,
    )
    run_distributed(run_in_float32, tensor * ranks, values, zero(stage))
    norms = [event["gradient_norm"] for event in events(folder, "step")]
    return [*losses(folder), *norms, *(event["loss"] for event in events(folder, "eval"))]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list]]:
    """Folder and numbers of the run of every case on one rank."""
    folders = {case: tmp_path_factory.mktemp(case) / "run" for case in CASES}
    return {case: (folder, _run(folder, data, case)) for case, folder in folders.items()}


@pytest.mark.parametrize(
    ("case", "layout", "grid", "stage"),
    [
        ("muon", "column_row", (2, 1), 1),
        ("muon_factors", "bottleneck", (2, 1), 0),
        ("muon_factors", "column_row", (2, 2), 2),
        ("dion2", "column_row", (2, 1), 1),
        ("normuon", "column_row", (2, 2), 1),
        ("nordion2", "column_row", (2, 1), 2),
        ("spectron", "column_row", (2, 1), 1),
        ("spectron", "bottleneck", (2, 2), 2),
        ("carried", "column_row", (2, 2), 2),
        ("carried", "bottleneck", (2, 1), 1),
        ("carried_spectron", "column_row", (2, 1), 2),
        ("lr_transfer", "column_row", (2, 1), 1),
        ("lr_transfer", "bottleneck", (2, 2), 1),
    ],
)
def test_a_grid_gives_the_numbers_of_one_rank(
    case: str,
    layout: str,
    grid: tuple[int, int],
    stage: int,
    alone: dict,
    data: Path,
    tmp_path: Path,
) -> None:
    tensor, ranks = grid
    found = _run(tmp_path / "run", data, case, tensor, layout, ranks, stage)
    folder, expected = alone[case]
    assert found == pytest.approx(expected, rel=1e-5)
    starts = [events(f, "start")[0]["parameter_groups"] for f in (folder, tmp_path / "run")]
    assert starts[0] == starts[1]
    if case == "lr_transfer":  # from half the width: half the rate
        rates = {name: group["lr"] for name, group in starts[1].items()}
        assert rates == {"factors": 0.005, "matrices": 0.01, "head": 0.005, "vectors": 0.01}


def _masters_and_states(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """By name of the tensor and of the state, whole."""
    source, found = checkpoint.source, {}
    for name in source.names():
        for key in (MASTER, *source.element_states(name)):
            found[name, key] = whole(source, name, key)
    for name in source.logical_tensors():
        found |= {(name, key): x for key, x in source.tensor_state(name).matrix.items()}
    return found


@pytest.mark.parametrize("layout", ["column_row", "bottleneck"])
@pytest.mark.parametrize("case", ["carried_muon", "carried_spectron"])
def test_ranks_carry_the_momenta_of_one_rank_to_its_new_factors(
    case: str, layout: str, alone: dict, data: Path, tmp_path: Path
) -> None:
    folder, expected = alone[case]
    assert _run(tmp_path / "grid", data, case, 2, layout) == pytest.approx(expected, rel=1e-5)
    restart = events(tmp_path / "grid", "restart")[0]
    assert restart["update"] == 4 and restart["moments_transported"] and not restart["reset"]
    parts, alike = (
        _masters_and_states(open_checkpoint(run, "update_4")) for run in (tmp_path / "grid", folder)
    )
    assert parts.keys() == alike.keys()
    momenta = sum(x.numel() for (_, key), x in alike.items() if key == "momentum_buffer")
    factors = (x for (name, key), x in alike.items() if key == MASTER and name[-2:] in (".a", ".b"))
    assert momenta == sum(x.numel() for x in factors) > 0
    for key, values in alike.items():
        error = (parts[key] - values).abs().max() / values.abs().max()
        assert error < 1e-5, key


@pytest.mark.parametrize("case", ["muon", "nordion2", "spectron"])
def test_a_grid_s_checkpoint_continues_bitwise_there_and_on_other_grids(
    case: str, alone: dict, data: Path, tmp_path: Path
) -> None:
    folder, expected = alone[case]
    _run(tmp_path / "grid", data, case, tensor=2)
    here = continued(tmp_path / "grid", tmp_path / "here", 5)
    _run(here, data, case, tensor=2)
    assert events(here, "resume")[0]["reshaped"] == {}
    assert losses(here) == losses(tmp_path / "grid")[5:]
    one = continued(tmp_path / "grid", tmp_path / "one", 5)
    _run(one, data, case)
    four = continued(folder, tmp_path / "four", 5)
    _run(four, data, case, tensor=2, ranks=2, stage=2)
    for reshaped in (one, four):
        assert events(reshaped, "resume")[0]["reshaped"]["tensor_parallel_size"]
        assert losses(reshaped) == pytest.approx(expected[5:8], rel=1e-5)


@pytest.mark.parametrize("case", ["muon", "nordion2", "spectron"])
def test_a_reader_finds_the_states_of_whole_matrices(
    case: str, alone: dict, data: Path, tmp_path: Path
) -> None:
    _run(tmp_path / "grid", data, case, tensor=2)
    whole = open_checkpoint(alone[case][0], "update_5").source
    universal = write_universal(open_checkpoint(tmp_path / "grid", "update_5"))
    for parts in (open_checkpoint(tmp_path / "grid", "update_5").source, open_source(universal)):
        assert sorted(parts.logical_tensors()) == sorted(whole.logical_tensors()) != []
        for name in whole.logical_tensors():
            found, expected = (s.tensor_state(name).matrix for s in (parts, whole))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
