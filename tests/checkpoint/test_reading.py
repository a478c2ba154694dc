"""What is read from a checkpoint's files without an engine is what the engine held."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalr.checkpoint import open_checkpoint, read_universal
from megalr.checkpoint.reshape import write_universal
from megalr.errors import UserError
from tests.ranks import run_distributed
from tests.training.runs import losses, run, settings, zero


def _convert_by_deepspeed(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, given the entry of the client state that it insists on."""
    from deepspeed.checkpoint import ds_to_universal

    for path in source.glob("mp_rank_*_model_states.pt"):
        states = torch.load(path, weights_only=False)
        states["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.2}
        # It takes the file for one of Megatron's.
        torch.save(states | {"iteration": states["global_steps"]}, path)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(arguments)


def _tensor(path: Path) -> Any:
    value = torch.load(path, weights_only=False)
    return value["param"] if isinstance(value, dict) else value


@pytest.mark.parametrize("stage, precision", [(1, "bf16"), (2, "fp32")])
def test_universal_tensors_are_those_of_deepspeeds_own_converter(
    stage: int, precision: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data, train={"updates": 3, "precision": precision})
    run_distributed(run, 2, values, zero(stage))
    checkpoint = open_checkpoint(folder)
    ours = write_universal(checkpoint) / "zero"
    theirs = tmp_path / "theirs"
    _convert_by_deepspeed(folder / "checkpoints" / "update_3", theirs)
    names = {path.name for path in (theirs / "zero").iterdir() if path.is_dir()}
    assert names >= set(checkpoint.names()) and len(names) == len(checkpoint.names())
    for name in checkpoint.names():
        for key in ("fp32", "exp_avg", "exp_avg_sq", "step"):
            expected = _tensor(theirs / "zero" / name / f"{key}.pt")
            found = _tensor(ours / name / f"{key}.pt")
            assert found.numel() == expected.numel()
            assert torch.equal(found.view(-1), expected.view(-1)), (name, key)


@pytest.mark.parametrize("method, stage", [("lora", 3), ("low_rank", 2)])
def test_a_checkpoint_is_the_same_from_every_stage_and_from_its_universal_folder(
    method: str, stage: int, data: Path, tmp_path: Path
) -> None:
    sections = {
        "method": {"name": method, "rank": 8, "alpha": 16.0},
        "train": {"updates": 3},
        "evaluation": {"every": 1},
    }
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    run_distributed(run, 1, settings(plain, data, **sections), zero(0))
    run_distributed(run, 3, settings(cut, data, **sections), zero(stage))
    reference, checkpoint = open_checkpoint(plain), open_checkpoint(cut)
    assert checkpoint.names() == reference.names()
    assert (checkpoint.update, checkpoint.tokens) == (reference.update, reference.tokens)
    assert checkpoint.config.method.name == method
    assert checkpoint.validation_loss == pytest.approx(reference.validation_loss, abs=1e-5)
    universal = read_universal(write_universal(checkpoint))
    assert list(universal) == checkpoint.names()
    for name in checkpoint.names():
        whole = checkpoint.parameter(name)
        assert whole.dtype == torch.float32 and whole.shape == checkpoint.shape(name)
        assert torch.allclose(whole, reference.parameter(name), atol=1e-4)
        assert torch.equal(universal[name], whole)
    with pytest.raises(KeyError):
        checkpoint.parameter("no.such.weight")


def test_a_run_goes_on_from_the_universal_folder_alone(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = settings(folder, data, checkpoint={"every": 5, "keep_last": 9})
    run_distributed(run, 2, values, zero(1))
    unbroken = losses(folder)
    write_universal(open_checkpoint(folder, "update_5"))
    for name in ("update_5", "update_10"):
        (folder / "checkpoints" / name).rename(tmp_path / name)
    (folder / "metrics.jsonl").unlink()
    run_distributed(run, 1, values, zero(2))
    assert losses(folder) == pytest.approx(unbroken[5:], abs=1e-5)


def test_the_tool_writes_the_folder_or_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_distributed(run, 1, settings(folder, data, train={"updates": 3}), zero(1))
    tool = Path(__file__).parents[2] / "tools" / "reshape_checkpoint.py"
    for arguments, code in (([str(folder)], 0), ([str(folder), "--tag", "update_2"], 2)):
        monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tool), run_name="__main__")
        assert ended.value.code == code
    output = capsys.readouterr()
    universal = folder / "checkpoints" / "update_3_universal"
    assert output.out.splitlines()[-1] == str(universal) and universal.is_dir()
    assert output.err.startswith("error: ") and "has no checkpoint update_2" in output.err


def test_what_cannot_be_opened_is_named_in_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint: give the folder of a run"):
        open_checkpoint(tmp_path)
    folder = tmp_path / "run"
    run_distributed(run, 1, settings(folder, data, train={"updates": 3}), zero(1))
    with pytest.raises(UserError, match="no checkpoint update_7: it has update_3"):
        open_checkpoint(folder, "update_7")
    with pytest.raises(UserError, match="is no universal checkpoint"):
        read_universal(folder / "checkpoints" / "update_3")
    universal = write_universal(open_checkpoint(folder))
    with pytest.raises(UserError, match="universal layout already"):
        write_universal(open_checkpoint(folder, universal.name))
    weights = folder / "checkpoints" / "update_3" / "mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model_states.pt has another checksum"):
        write_universal(open_checkpoint(folder, "update_3"))
    weights.unlink()
    with pytest.raises(UserError, match=r"model_states.pt is missing\): choose another one"):
        open_checkpoint(folder, "update_3")
