"""Runs of every ZeRO stage: what is exported and evaluated alone is what the engine computed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalr.checkpoint import open_checkpoint
from megalr.checkpoint.manifest import MANIFEST, manifest_text, read_manifest, record_of
from megalr.checkpoint.reshape import write_universal
from megalr.checkpoint.source import STATE
from megalr.cli.main import main
from megalr.config.schema import RunConfig
from megalr.data.manifest import load_manifest
from megalr.errors import UserError
from megalr.evaluation.offline import Request, evaluate_model, evaluate_run
from megalr.hf.export_run import export_run
from megalr.hf.trained_run import load_decoder, open_verified, run_config, tokenizer_of
from megalr.run.folder import write_run_folder
from tests.damage import mutated_bytes, mutated_json
from tests.hf.data import write_data, write_tokenizer
from tests.ranks import run_distributed
from tests.training.runs import events, run, settings, zero
from tests.training.test_methods import METHODS

CPU = torch.device("cpu")
SHORT = {"train": {"updates": 4}, "schedule": {"warmup_updates": 0}, "checkpoint": {"every": 2}}
TP = {"parallel": {"tensor": 2}}
RUNS: dict[str, tuple[int, dict[str, dict]]] = {
    "low_rank_zero0": (0, {"restarts": {"every": 3}}),
    "lora_zero1": (1, METHODS["lora"]),
    "sltrain_zero2": (2, METHODS["sltrain"]),
    "lora_zero3": (3, METHODS["lora"]),
    "galore_zero1": (1, METHODS["galore"]),
    "cola_zero1": (1, METHODS["cola"]),
    "relora_zero2": (2, METHODS["relora"]),
    "sltrain_tensor2": (1, {**METHODS["sltrain"], **TP}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="module")
def bf16_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run of two ranks, ZeRO 2, with checkpoints after 2 and 4 updates, evaluated on some
    of the validation data and on all of it."""
    folder = tmp_path_factory.mktemp("runs") / "bf16"
    evaluation = {"every": 2, "tokens": 240, "final_tokens": 100_000}
    other = {"train": {**SHORT["train"], "precision": "bf16"}, "evaluation": evaluation}
    run_distributed(run, 2, settings(folder, data, **{**SHORT, **other}), zero(2))
    return folder


def _export(folder: Path, output: Path, **changes: Any) -> None:
    options: dict[str, Any] = {"tag": None, "dtype": "float32", "max_shard_size": "5GB"}
    export_run(folder, output=output, **{"tokenizer": None, **options, **changes})


@pytest.mark.parametrize("name", RUNS)
def test_exported_weights_give_the_loss_and_logits_of_the_engine(
    name: str, data: Path, tmp_path: Path
) -> None:
    stage, sections = RUNS[name]
    folder = tmp_path / "run"
    values = settings(folder, data, **{**SHORT, **sections}, evaluation={"every": 0})
    run_distributed(run, 2, values, zero(stage))
    (engine,) = events(folder, "eval")
    again = evaluate_run(folder, None, Request(), CPU)
    assert again["loss"] == pytest.approx(engine["loss"], abs=1e-6)
    assert (again["tokens"], again["update"]) == (engine["tokens"], 4)

    length = values["data"]["sequence_length"]
    decoder = load_decoder(folder, open_verified(folder, None))
    ids = torch.randint(0, 120, (2, length))
    absent = {"galore_zero1": "factorized", "cola_zero1": "dense"}.get(name)
    for form in ("dense", "factorized"):
        output = tmp_path / form
        if form == absent:
            with pytest.raises(UserError, match=r"stores dense matrices: use --form|nonlinearity"):
                _export(folder, output, form=form)
            continue
        _export(folder, output, form=form)
        request = Request(data=(str(data),), tokens=again["tokens"])
        exported = evaluate_model(output, request, CPU)
        assert exported["sequence_length"] == length
        assert exported["tokens"] == engine["tokens"]
        assert exported["loss"] == pytest.approx(engine["loss"], abs=1e-5)
        model = AutoModelForCausalLM.from_pretrained(output).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, decoder(ids), atol=1e-5, rtol=1e-4)


def _evaluate(folder: str, tag: str) -> dict[str, Any]:
    return evaluate_run(Path(folder), tag, Request(), CPU)


def test_a_universal_folder_is_evaluated_like_its_checkpoint(
    bf16_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(bf16_run, tmp_path / "run")
    write_universal(open_checkpoint(tmp_path / "run", "update_2"))
    found = evaluate_run(tmp_path / "run", "update_2_universal", Request(), CPU)
    assert found["checkpoint"] == "update_2_universal"
    assert found["loss"] == pytest.approx(events(bf16_run, "eval")[0]["loss"], abs=1e-6)


def test_evaluation_alone_repeats_the_runs_numbers_on_any_number_of_ranks(bf16_run: Path) -> None:
    for event in events(bf16_run, "eval"):
        tag = f"update_{event['update']}"
        for found in (*run_distributed(_evaluate, 2, str(bf16_run), tag), _evaluate(bf16_run, tag)):
            assert found["dtype"] == "bfloat16"
            # The order of the sum differs between one rank and two.
            assert found["loss"] == pytest.approx(event["loss"], abs=1e-6)
            assert found["perplexity"] == pytest.approx(event["perplexity"], rel=1e-6)
            assert found["tokens"] == event["tokens"]


def test_the_last_evaluation_may_have_more_tokens(bf16_run: Path) -> None:
    on_the_way, last = events(bf16_run, "eval")
    assert 240 - 24 < on_the_way["tokens"] <= 240 < last["tokens"]
    everything = evaluate_run(bf16_run, "update_4", Request(tokens=0), CPU)
    assert last["tokens"] == everything["tokens"] == everything["available_tokens"]
    assert any("perplexity_published depends on the batch shape" in n for n in everything["notes"])
    part = evaluate_run(bf16_run, "update_4", Request(tokens=240), CPU)
    assert part["tokens"] == on_the_way["tokens"]
    assert part["available_tokens"] == everything["tokens"]
    assert abs(part["loss"] - last["loss"]) > 1e-4


def test_the_folder_has_tokenizer_generation_settings_and_a_card(
    bf16_run: Path, data: Path, tmp_path: Path
) -> None:
    _export(bf16_run, tmp_path / "out", tag="update_2", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w7 w30", add_special_tokens=False)["input_ids"] == [7, 30]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (1, 0, None)
    assert config["max_position_embeddings"] == 24
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "low_rank" in front["tags"]
    perplexity = events(bf16_run, "eval")[0]["perplexity"]
    tokens = next(e["tokens"] for e in events(bf16_run, "step") if e["update"] == 2)
    for row in (
        "| method | low_rank (rank 8, ",
        "| optimizer | adamw (lr 0.01, ",
        "| updates | 2 |",
        f"| training tokens | {tokens:,} |",
        f"| validation perplexity | {perplexity:.6g} |",
        "| training precision | bf16 |",
        "| dtype of these weights | bfloat16 |",
        "| megalr | ",
    ):
        assert row in card, (row, card)
    assert "The weights are dense" in card and "trust_remote_code" not in card
    _export(bf16_run, tmp_path / "factors", form="factorized")
    card = (tmp_path / "factors" / "README.md").read_text()
    assert "stored as factors" in card and "trust_remote_code=True)" in card


def test_an_odd_width_is_pointed_out_and_its_padding_is_written_if_asked_for(
    bf16_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _export(bf16_run, tmp_path / "without")
    assert "note: the MLP is 83 wide, which is slow on GPUs" in capsys.readouterr().out
    main(["export", str(bf16_run), "--output", str(tmp_path / "with"), "--keep_padding"])
    assert "note" not in capsys.readouterr().out
    assert "MLP 96," in (tmp_path / "with" / "README.md").read_text()
    ids = torch.arange(2, 22)[None]
    logits = []
    for name, width in (("without", 83), ("with", 96)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.intermediate_size == width
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)


def test_files_of_another_model_beside_a_tokenizer_are_left_out(
    bf16_run: Path, tmp_path: Path
) -> None:
    source = write_tokenizer(tmp_path / "source")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')
    (source / "config.json").write_text('{"model_type": "bert"}')
    _export(bf16_run, tmp_path / "out", tokenizer=str(source))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    _export(bf16_run, tmp_path / "bare", tokenizer="none")
    assert not list((tmp_path / "bare").glob("tokenizer*"))


def test_a_tokenizer_with_other_ids_than_trainings_is_refused(
    bf16_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"gives other ids .*: 'w0' is 0 there and no id here"):
        _export(bf16_run, tmp_path / "out", tokenizer=str(write_tokenizer(tmp_path / "v", "v")))
    assert not (tmp_path / "out").exists()
    data.rename(tmp_path / "moved")
    same = str(tmp_path / "moved" / "tokenizer")
    _export(bf16_run, tmp_path / "out", tokenizer=same)
    (tmp_path / "moved").rename(data)
    assert "was not compared with training's" in capsys.readouterr().out


def test_checkpoints_that_are_not_whole_are_refused_in_one_line(
    bf16_run: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bf16_run, folder)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            _export(changes.pop("run", folder), tmp_path / "out", **changes)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("has no checkpoint update_3: it has update_2, update_4", tag="update_3")
    refused("holds no checkpoint: give the folder of a run", run=data)
    with pytest.raises(UserError, match="nowhere holds no checkpoint"):
        evaluate_run(Path("nowhere"), None, Request(), CPU)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match=r"--output .* is not an empty folder"):
        _export(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    data.rename(tmp_path / "moved")
    refused(r"no such file.*give it with --tokenizer PATH, or --tokenizer none")
    (tmp_path / "moved").rename(data)
    refused("--max_shard_size '5XB'", max_shard_size="5XB")
    big = write_tokenizer(tmp_path / "big", size=121)
    refused("the tokenizer has 121 ids and the model 120", tokenizer=str(big))
    last = folder / "checkpoints" / "update_4"
    victim = max(last.rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    refused("is damaged .*checksum.*--tag")
    (last / "manifest.json").unlink()
    refused("is damaged .*never finished.*update_2")
    foreign = tmp_path / "foreign" / "checkpoints" / "update_7"
    foreign.mkdir(parents=True)
    (foreign / "mp_rank_00_model_states.pt").write_bytes(b"another program's")
    refused("is damaged .*never finished", run=tmp_path / "foreign")


def test_data_is_found_from_any_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    shutil.copytree(data, start / "data")
    monkeypatch.chdir(start)
    values = settings(Path("runs/a"), Path("data"))
    values["data"]["validation"] = ["data", "gone"]
    config = RunConfig.model_validate(values)
    write_run_folder(config, {})
    monkeypatch.chdir(tmp_path)
    checkpoint = start / "runs/a/checkpoints/update_1"
    saved = SimpleNamespace(config=config, folder=checkpoint, state={})
    first = run_config(saved)  # type: ignore[arg-type]
    # From another start than the last one, whose working directory the run's folder has.
    write_run_folder(RunConfig.model_validate(settings(start / "runs/a", start / "data")), {})
    state = {"working_directory": str(start)}
    moved_on = SimpleNamespace(config=config, folder=checkpoint, state=state)
    for found in (first, run_config(moved_on)):  # type: ignore[arg-type]
        assert [source.path for source in found.data.train] == [str(start / "data")]
        assert found.data.validation == (str(start / "data"), str(start / "gone"))
        assert tokenizer_of(found).path == start / "data" / "tokenizer"


def test_the_example_of_the_checkpoints_page_runs(
    bf16_run: Path, capsys: pytest.CaptureFixture
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("runs/NAME", str(bf16_run)), names)
    checkpoint = names["checkpoint"]
    assert checkpoint.update == 4
    with pytest.raises(UserError, match=r"no parameter 'layers.0.attention.qkv.weight'.*qkv.a"):
        checkpoint.parameter("layers.0.attention.qkv.weight")


def test_data_that_does_not_fit_is_refused(bf16_run: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", prefix="v")
    with pytest.raises(UserError, match="made with another tokenizer than the run's"):
        evaluate_run(bf16_run, None, Request(data=(str(other),)), CPU)
    _export(bf16_run, tmp_path / "out")
    with pytest.raises(UserError, match="'v0' is 0 there and no id here"):
        evaluate_model(tmp_path / "out", Request(data=(str(other),)), CPU)
    with pytest.raises(UserError, match=r"--sequence_length 25: the model in .* is meant for 24"):
        evaluate_model(tmp_path / "out", Request(data=(str(other),), sequence_length=25), CPU)
    with pytest.raises(UserError, match="--model needs --data"):
        evaluate_model(tmp_path / "out", Request(), CPU)
    with pytest.raises(UserError, match=r"holds no config.json"):
        evaluate_model(other, Request(data=(str(other),)), CPU)


@pytest.mark.parametrize(("packing", "masks"), [(True, False), (False, False), (True, True)])
def test_an_exported_folder_is_evaluated_on_the_targets_of_its_run(
    packing: bool, masks: bool, data: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "run", tmp_path / "out"
    sections = {**SHORT, "evaluation": {"every": 0, "tokens": 240}}
    values = settings(folder, data, **sections)
    values["data"] |= {"packing": packing, "document_mask": masks}
    run_distributed(run, 2, values, zero(1))
    (engine,) = events(folder, "eval")
    _export(folder, output)
    found = evaluate_model(output, Request(data=(str(data),)), CPU)
    assert found["tokens"] == engine["tokens"] < found["available_tokens"]
    assert found["loss"] == pytest.approx(engine["loss"], abs=1e-5)
    if masks:
        other = evaluate_model(output, Request(data=(str(data),), document_mask=False), CPU)
        assert other["available_tokens"] > found["available_tokens"]

    config = json.loads((output / "config.json").read_text())
    for wrong in (7, {}, {"packing": 1, "tokens": 5}, {"packing": True, "tokens": 0}):
        (output / "config.json").write_text(json.dumps({**config, "megalr_evaluation": wrong}))
        with pytest.raises(UserError, match="must hold packing"):
            evaluate_model(output, Request(data=(str(data),)), CPU)


def _restamp(folder: Path) -> None:
    """Make a checkpoint's manifest agree with its ``state.json`` again."""
    manifest = read_manifest(folder)
    files = {**manifest.files, STATE: record_of(folder / STATE)}
    (folder / MANIFEST).write_text(manifest_text(dataclasses.replace(manifest, files=files)))


@pytest.mark.parametrize("target", ["state", "data manifest", "tokenizer"])
def test_a_mutated_run_is_exported_or_refused_in_one_line(
    target: str, bf16_run: Path, data: Path, tmp_path: Path
) -> None:
    folder, copy, output = tmp_path / "run", tmp_path / "data", tmp_path / "out"
    shutil.copytree(bf16_run, folder)
    shutil.copytree(data, copy)
    checkpoint = folder / "checkpoints" / "update_4"
    state = json.loads((checkpoint / STATE).read_text())
    state["config"]["data"]["train"][0]["path"] = str(copy)
    (checkpoint / STATE).write_text(json.dumps(state))
    _restamp(checkpoint)
    _export(folder, output)
    manifest = load_manifest(copy)
    path = {
        "state": checkpoint / STATE,
        "data manifest": copy / "manifest.json",
        "tokenizer": copy / manifest.tokenizer.path / "tokenizer.json",
    }[target]
    whole = path.read_bytes()
    outcomes = {"exported": 0, "refused": 0}
    for seed in range(100):
        shutil.rmtree(output, ignore_errors=True)
        if target == "tokenizer":
            path.write_bytes(mutated_bytes(whole, seed))
        else:
            path.write_text(json.dumps(mutated_json(json.loads(whole), seed)))
        if target == "state":
            _restamp(checkpoint)
        try:
            _export(folder, output)
        except UserError as error:
            assert "\n" not in str(error) and not output.exists()
            outcomes["refused"] += 1
        else:
            outcomes["exported"] += 1
    assert outcomes["refused"] > 10, outcomes
