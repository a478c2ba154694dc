"""A pretrained model of transformers becomes the start of a run, exactly or factorized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from megalr.config.schema import RunConfig
from megalr.data import open_training_data
from megalr.errors import UserError
from megalr.evaluation.offline import Request, evaluate_model, evaluate_run
from megalr.hf.export_run import export_run
from megalr.hf.init_from_pretrained import (
    Imported,
    check_same_tokenizers,
    import_weights,
    trial_import,
)
from megalr.hf.names import dense_state_dict
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.write import ExportOptions, write_model
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.models.decoder import Decoder
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.hf.data import write_data, write_tokenizer
from tests.hf.models import FAMILIES, lively
from tests.models.settings import factorized, full_rank, low_rank
from tests.ranks import RankFailed, run_distributed
from tests.training.runs import events, losses, run, settings, zero
from tests.training.test_methods import METHODS

CPU = torch.device("cpu")
NOT_IMPORTED = ("llama_biases",)
RANK = 8


def _folder(
    path: Path, tokenizer: Path | None = None, dtype: str = "float32", **sizes: Any
) -> Path:
    chosen = open_tokenizer(tokenizer) if tokenizer is not None else None
    options = ExportOptions(dtype, "40KB", 64)
    write_model(lively(full_rank(), **sizes), path, options, chosen, "card")
    return path


def _imported(folder: Path, method: Any) -> tuple[Decoder, Imported]:
    decoder = build_decoder(decoder_config(None, pretrained_sizes(folder)), method, seed=1)
    return decoder, import_weights(folder, decoder, CPU)


@pytest.mark.parametrize(
    "method", [full_rank(), low_rank(), *map(factorized, ("sltrain", "lora"))], ids=lambda m: m.name
)
def test_weights_in_bf16_are_those_imported_in_float32_and_rounded(
    method: Any, llama: Path
) -> None:
    decoder, imported = _imported(llama, method)
    sizes = decoder_config(None, pretrained_sizes(llama))
    half = build_decoder(sizes, method, seed=1, dtype=torch.bfloat16)
    assert import_weights(llama, half, CPU).relative_error == imported.relative_error
    expected = decoder.bfloat16().state_dict()
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded LLaMA folder in bfloat16."""
    return _folder(tmp_path_factory.mktemp("models") / "llama", dtype="bfloat16")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_IMPORTED])
def test_full_rank_takes_the_weights_bit_by_bit(family: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", **FAMILIES[family][0])
    decoder, imported = _imported(folder, full_rank())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = dense_state_dict(decoder)
    assert all(torch.equal(state[name], value) for name, value in model.named_parameters())
    assert set(imported.relative_error.values()) == {0.0}
    ids = torch.randint(0, 101, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    again = tmp_path / "again"
    write_model(decoder, again, ExportOptions("float32", "40KB", 64), None, "card")
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in files)


@pytest.mark.parametrize("family", ["mistral_nemo", "qwen3", "smollm3", "olmo2", "phi3"])
def test_factors_of_other_families_are_the_truncated_svd(family: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", **FAMILIES[family][0])
    decoder, imported = _imported(folder, low_rank(RANK))
    dense, _ = _imported(folder, full_rank())
    found, exact = dense_state_dict(decoder), dense_state_dict(dense)
    for (layer, names), (other, _) in zip(_matrices(decoder), _matrices(dense), strict=True):
        for index, name in enumerate(names):
            w = other.dense_weight(index).double().numpy()
            u, s, vh = np.linalg.svd(w)
            best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
            np.testing.assert_allclose(layer.dense_weight(index).numpy(), best, atol=2e-6)
            error = np.linalg.norm(w - best) / np.linalg.norm(w)
            assert imported.relative_error[name] == pytest.approx(error, rel=1e-4)
    plain = [name for name in exact if "norm" in name or "embed" in name]
    assert all(torch.equal(found[name], exact[name]) for name in plain)


def _matrices(decoder: Decoder) -> list[tuple[Any, tuple[str, ...]]]:
    return [(layer, layer.shape.names) for layer in decoder.linears()]


def _truncated(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """By name in the folder: the matrix, its best approximation of rank RANK, our name; numpy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    found = {}
    for name, value in model.named_parameters():
        if value.dim() == 2 and "layers" in name:
            w = value.detach().double().numpy()
            u, s, vh = np.linalg.svd(w)
            _, _, number, part, projection, _ = name.split(".")
            part = "attention" if part == "self_attn" else part
            ours = f"layers.{number}.{part}.{projection.removesuffix('_proj')}"
            found[name] = w, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], ours
    return found


def test_low_rank_takes_the_truncated_svd_balanced_and_reports_its_error(llama: Path) -> None:
    decoder, imported = _imported(llama, low_rank(RANK))
    state = dense_state_dict(decoder)
    for name, (w, best, ours) in _truncated(llama).items():
        np.testing.assert_allclose(state[name].numpy(), best, atol=2e-6)
        error = np.linalg.norm(w - best) / np.linalg.norm(w)
        assert imported.relative_error[ours] == pytest.approx(error, rel=1e-4)
        assert error > 0.1
    for pair in decoder.factor_pairs():
        b, a = pair.b[slice(*pair.b_rows)], pair.a[slice(*pair.a_rows)]
        torch.testing.assert_close(b.t() @ b, a @ a.t(), atol=1e-5, rtol=1e-4)
    errors = imported.relative_error
    q = [errors["layers.0.attention.q"], errors["layers.1.attention.q"]]
    trial = trial_import(llama, RANK, density=None).by_projection()
    assert trial["q"] == pytest.approx((sum(q) / 2, max(q)), rel=1e-5)
    with pytest.raises(UserError, match="--rank 0: Input should be greater"):
        trial_import(llama, 0, density=None)
    numbers = imported.metrics()
    assert numbers["matrices"] == 14
    assert numbers["relative_error_max"] == max(imported.relative_error.values())


def test_sltrain_adds_the_largest_entries_of_the_rest(llama: Path) -> None:
    decoder, imported = _imported(llama, factorized("sltrain", RANK))
    state = dense_state_dict(decoder)
    for name, (w, best, ours) in _truncated(llama).items():
        rest = (w - best).ravel()
        count = int(0.1 * rest.size)
        largest = np.sort(np.argsort(-np.abs(rest), kind="stable")[:count])
        np.testing.assert_array_equal(imported.supports[ours], largest)
        expected = best.ravel().copy()
        expected[largest] = w.ravel()[largest]
        np.testing.assert_allclose(state[name].numpy().ravel(), expected, atol=2e-6)
        error = np.linalg.norm(w.ravel() - expected) / np.linalg.norm(w)
        assert imported.relative_error[ours] == pytest.approx(error, rel=1e-4)
    again = build_decoder(
        decoder.config, factorized("sltrain", RANK), 7, sparse_indices=imported.supports
    )
    supports = [m.support for d in (decoder, again) for m in d.linears() if _is_sparse(m)]
    half = len(supports) // 2
    assert all(torch.equal(x, y) for x, y in zip(supports[:half], supports[half:], strict=True))


def _is_sparse(module: Any) -> bool:
    return isinstance(module, SLTrainLinear)


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_lora_freezes_the_weights_and_starts_at_them(name: str, llama: Path) -> None:
    decoder, imported = _imported(llama, factorized(name, RANK))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).float()
    state = dense_state_dict(decoder)
    assert all(torch.equal(state[key], value) for key, value in model.named_parameters())
    assert all(bool(layer.a.any()) and not layer.b.any() for layer in decoder.linears())
    assert max(imported.relative_error.values()) == 0


def _config_of(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the folder with another config.json."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "'bert' cannot be read; those that work: llama, mistral, qwen2"),
        ({"model_type": "nonsense"}, "'nonsense' cannot be read"),
        ({"head_dim": 16}, r"q_proj.weight has shape \(48, 48\), config.json says \(96, 48\)"),
        ({"head_dim": 7}, "an odd head_dim, 7|an even rotary dimension"),
        ({"attention_bias": True}, "with attention_bias cannot be read"),
        ({"hidden_act": "gelu"}, "with hidden_act gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "a llama model with rope_type dynamic cannot be read",
        ),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "also holds model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 84}, "has shape .*config.json says"),
    ],
)
def test_a_model_that_is_not_the_plain_architecture_is_refused(
    changes: dict, message: str, llama: Path, tmp_path: Path
) -> None:
    folder = _config_of(llama, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message) as caught:
        _imported(folder, full_rank())
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(llama: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            _imported(folder, full_rank())
        assert "\n" not in str(caught.value)

    folder = tmp_path / "model"
    refused("config.json: No such file")
    shutil.copytree(llama, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(f"{shard.name}: cannot be read")
    shard.unlink()
    refused(f"{shard.name}: cannot be read")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused("index.json: no index of weights")
    (folder / "model.safetensors.index.json").unlink()
    refused("holds no model.safetensors")
    (folder / "config.json").write_text("{")
    refused("config.json: not valid JSON")
    shutil.rmtree(folder)
    broken = lively(full_rank())
    write_model(broken, folder, ExportOptions("float32", "5GB", 64), None, "")
    tensors = {name: tensor.contiguous() for name, tensor in dense_state_dict(broken).items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    refused("model.layers.0.mlp.down_proj.weight holds numbers that are not finite")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the data's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "model"
    return _folder(folder, data / "tokenizer", vocab_size=120, num_heads=4, num_kv_heads=2)


def _values(folder: Path, data: Path, model: Path, **sections: dict) -> dict[str, Any]:
    short = {"train": {"updates": 4}, "schedule": {"warmup_updates": 0}, "checkpoint": {"every": 2}}
    values = settings(folder, data, **{**short, "evaluation": {"every": 0}, **sections})
    values["model"] = {"from_pretrained": str(model), "pad_multiple": 16}
    return values


def test_a_run_starts_with_the_function_of_the_pretrained_model(
    data: Path, model: Path, tmp_path: Path
) -> None:
    still = {"method": {"name": "full_rank"}, "optimizer": {"lr": 1e-12, "weight_decay": 0.0}}
    values = _values(tmp_path / "run", data, model, train={"updates": 1}, **still)
    run_distributed(run, 2, values, zero(1))
    (found,) = events(tmp_path / "run", "eval")
    request = Request(data=(str(data),), tokens=found["tokens"], sequence_length=24)
    expected = evaluate_model(model, request, CPU)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert events(tmp_path / "run", "start")[0]["model"] == str(model)


@pytest.mark.long
def test_sltrain_goes_on_without_the_pretrained_model_on_any_grid(
    data: Path, model: Path, tmp_path: Path
) -> None:
    alone, sharded, grid = (tmp_path / name for name in ("alone", "sharded", "grid"))
    method = METHODS["sltrain"]
    copied = tmp_path / "model"
    shutil.copytree(model, copied)
    run_distributed(run, 1, _values(alone, data, copied, **method), zero(0))
    run_distributed(run, 2, _values(sharded, data, copied, **method), zero(3))
    parallel = {"parallel": {"tensor": 2}}
    run_distributed(run, 2, _values(grid, data, copied, **method, **parallel), zero(1))
    assert losses(sharded) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(grid) == pytest.approx(losses(alone), abs=1e-5)
    reports = [events(folder, "import")[0] for folder in (alone, sharded, grid)]
    for report in reports:
        assert report["matrices"] == len(report["relative_error"]) == 14
        assert report["relative_error"] == pytest.approx(reports[0]["relative_error"], rel=1e-5)

    shutil.rmtree(copied)
    # The same shape goes on bitwise; from the grid it goes on alone, on one rank.
    for folder, world, stage, bound in ((sharded, 2, 3, 0.0), (grid, 1, 0, 1e-5)):
        unbroken = losses(folder)
        shutil.rmtree(folder / "checkpoints" / "update_4")
        (folder / "metrics.jsonl").unlink()
        run_distributed(run, world, _values(folder, data, copied, **method), zero(stage))
        assert events(folder, "import") == []
        assert losses(folder) == pytest.approx(unbroken[2:], abs=bound, rel=0)
        engine = events(folder, "eval")[-1]["loss"]
        assert evaluate_run(folder, None, Request(), CPU)["loss"] == pytest.approx(engine, abs=1e-6)
    fork = tmp_path / "fork"
    values = _values(fork, data, copied, **method)
    values["run"]["fork_from"] = f"{sharded}@2"
    run_distributed(run, 2, values, zero(3))
    assert events(fork, "import") == [] and events(fork, "fork")[0]["update"] == 2
    assert losses(fork) == losses(sharded)
    supports = "sltrain_supports.safetensors"
    assert (fork / supports).read_bytes() == (sharded / supports).read_bytes()
    export_run(grid, None, tmp_path / "out", "float32", "5GB", None)
    request = Request(data=(str(data),), sequence_length=24)
    exported = evaluate_model(tmp_path / "out", request, CPU)["loss"]
    assert exported == pytest.approx(engine, abs=1e-5)
    (sharded / "sltrain_supports.safetensors").unlink()
    with pytest.raises(UserError, match=r"sltrain_supports.safetensors: cannot be read"):
        evaluate_run(sharded, None, Request(), CPU)


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_are_compared_whatever_files_the_model_has(
    form: str, data: Path, model: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "model"
    shutil.copytree(model, copied)
    if form == "tokenizer.json":  # nothing beside it
        (copied / "tokenizer_config.json").unlink()
    own, other = (
        open_training_data([{"path": str(path)}], sequence_length=24, packing=True)
        for path in (data, write_data(tmp_path / "other", prefix="v"))
    )
    check_same_tokenizers(own, copied)
    with pytest.raises(UserError, match="'v0' is 0 there and no id here"):
        check_same_tokenizers(other, copied)
    request = Request(data=(str(tmp_path / "other"),))
    with pytest.raises(UserError, match="'v0' is 0 there and no id here"):
        evaluate_model(copied, request, CPU)


def test_sizes_and_tokenizers_that_contradict_the_model_are_refused(
    data: Path, model: Path, tmp_path: Path
) -> None:
    def refused(values: dict, message: str) -> None:
        with pytest.raises(RankFailed, match=message):
            run_distributed(run, 1, values, zero(1))
        assert not (tmp_path / "run").exists()

    values = _values(tmp_path / "run", data, model, method={"name": "full_rank"})
    values["model"]["num_layers"] = 3
    refused(values, "has other sizes .model.num_layers is 3, there 2.: leave these keys out")
    del values["model"]["num_layers"]
    other = write_data(tmp_path / "other", prefix="v")
    values["data"]["train"] = str(other)
    refused(values, "'v0' is 0 there and no id here; preprocess the text with --tokenizer")
    values["data"]["train"] = str(data)
    small = tmp_path / "small"
    small_tokenizer = write_tokenizer(tmp_path / "tokenizer", size=100)
    values["model"]["from_pretrained"] = str(_folder(small, small_tokenizer, vocab_size=100))
    refused(values, "its tokenizer has 120 ids and the model in .* 100")
    values["method"] = METHODS["cola"]["method"]
    with pytest.raises(ValueError, match="method cola has a nonlinearity between its factors"):
        RunConfig.model_validate(values)
