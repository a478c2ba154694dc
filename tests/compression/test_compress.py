"""Factorized folders against transformers' dense model with the products of the factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GPT2Model
from transformers.pytorch_utils import Conv1D

from megalr.cli.formats import factorize_command
from megalr.compression import compress
from megalr.compression.calibration import CalibrationOptions
from megalr.compression.compress import CompressionOptions, compress_folder
from megalr.errors import UserError
from tests.compression.models import FAMILIES, load, sample, saved, tiny_model
from tests.hf.data import write_data, write_tokenizer
from tests.synthetic import VOCAB_SIZE

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
STACKED = {"c_attn": 3, "gate_up_proj": 2}
FULL = CompressionOptions(rank_share=1.0)
QUARTER = CompressionOptions(rank_share=0.25)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers of all blocks, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }


def parts_of(name: str, rows: int) -> list[int]:
    """Rows of the matrices in one weight."""
    leaf = name.rpartition(".")[2]
    if leaf == "qkv_proj":
        return [32, 16, 16]
    return [rows // STACKED.get(leaf, 1)] * STACKED.get(leaf, 1)


@torch.no_grad()
def truncate(model: Any, share: float) -> Any:
    """Every matrix becomes its truncated SVD, by numpy in float64."""
    for name, module in linears(model).items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        rows = parts_of(name, len(weight))
        rank = max(1, round(share * min(weight.shape[1], *rows)))
        done = []
        for part in weight.split(rows):
            u, s, vh = np.linalg.svd(part.double().numpy(), full_matrices=False)
            done.append(torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank]))
        new = torch.cat(done).float()
        module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_dense_model_with_truncated_matrices(
    name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "dense", name)
    outcome = compress_folder(folder, tmp_path / "out", QUARTER)
    model = load(tmp_path / "out")
    assert model.config.model_type == f"megalr_{FAMILIES[name][0]}"
    expected = truncate(tiny_model(name), 0.25)(sample()).logits
    torch.testing.assert_close(model(sample()).logits, expected, **TOLERANCE)
    assert float((expected - tiny_model(name)(sample()).logits).std()) > 0.05
    dense = tiny_model(name)
    assert outcome.numbers == (
        sum(p.numel() for p in dense.parameters()),
        sum(p.numel() for p in model.parameters()),
    )
    if name != "phi3":
        shared = hasattr(model.base_model, "layers") and model.model.layers[0].mlp.shared_a
        assert bool(shared) == (name != "gpt2")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_factors_of_full_rank_are_the_dense_model(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", name)
    if name == "phi3":  # q has a larger rank than k and v
        options = CompressionOptions(rank_share=1.0, targets=("gate_up_proj", "mlp.down_proj"))
    else:
        options = FULL
    outcome = compress_folder(folder, tmp_path / "out", options)
    assert max(outcome.errors.values()) == 0
    expected = tiny_model(name)(sample()).logits
    torch.testing.assert_close(load(tmp_path / "out")(sample()).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_layers_that_are_no_targets_stay_dense(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense")
    options = CompressionOptions(rank=3, targets=("q_proj", "mlp.down_proj"))
    outcome = compress_folder(folder, tmp_path / "out", options)
    assert outcome.ranks == {"self_attn.q_proj": 3, "mlp.down_proj": 3}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tiny_model().state_dict().items():
        if "q_proj" not in name and "down_proj" not in name:
            assert torch.equal(stored[name], tensor)
    assert stored["model.layers.1.self_attn.q_proj.a.weight"].shape == (3, 32)
    assert load(tmp_path / "out")(sample()).logits.isfinite().all()


@torch.no_grad()
def test_several_weight_files_in_and_out_are_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    compress_folder(tmp_path / "dense", tmp_path / "one", QUARTER)
    monkeypatch.setattr(compress, "SHARD_SIZE", "8KB")
    compress_folder(tmp_path / "dense", tmp_path / "many", QUARTER)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load(tmp_path / name)(sample()).logits for name in ("one", "many"))
    assert torch.equal(one, many)


@torch.no_grad()
def test_a_folder_of_the_base_model_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    whole = tiny_model("gpt2")
    base = GPT2Model(whole.config)
    base.load_state_dict(whole.transformer.state_dict())
    base.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "out", FULL)
    logits = load(tmp_path / "out")(sample()).logits
    torch.testing.assert_close(logits, whole(sample()).logits, **TOLERANCE)


@torch.no_grad()
def test_tensors_are_rounded_once_to_the_dtype_of_the_files_or_the_given_one(
    tmp_path: Path,
) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path / "dense")
    outputs = [tmp_path / "own", tmp_path / "float32"]
    for output, dtype in zip(outputs, (None, "float32"), strict=True):
        compress_folder(tmp_path / "dense", output, CompressionOptions(rank=4, dtype=dtype))
    own, single = (load_file(output / "model.safetensors") for output in outputs)
    assert own.keys() == single.keys()
    for name, tensor in single.items():
        assert tensor.dtype is torch.float32 and torch.equal(own[name], tensor.bfloat16())
    assert load(outputs[0]).dtype is torch.bfloat16


# -- calibration ---------------------------------------------------------------------------


def with_text(tmp_path: Path, words: int = 2000) -> tuple[Path, Path]:
    """A model with a tokenizer of words, and a text of them, most of them rare."""
    folder = saved(tmp_path / "dense", "llama_biases_tied", vocab_size=VOCAB_SIZE)
    for file in write_tokenizer(tmp_path / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    numbers = np.random.default_rng(3).geometric(0.1, words).clip(max=50) + 2
    lines = [" ".join(f"w{number}" for number in row) for row in numbers.reshape(-1, 40)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return folder, tmp_path / "text.txt"


def stream_of(text: Path) -> torch.Tensor:
    """Windows (n, 32) of the text, each line ended by w1."""
    words = " w1 ".join(text.read_text().splitlines()).split()
    ids = torch.tensor([int(word[1:]) for word in words])
    return ids[: len(ids) // 32 * 32].view(-1, 32)


@torch.no_grad()
def inputs_of(model: Any, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear layer reads (tokens, n), float64."""
    found: dict[str, torch.Tensor] = {}
    for name, module in linears(model).items():
        module.register_forward_pre_hook(lambda _, x, name=name: found.update({name: x[0]}))
    model(windows)
    return {name: x.flatten(0, 1).double() for name, x in found.items()}


@torch.no_grad()
def test_outputs_of_calibrated_layers_are_as_close_as_the_rank_allows(tmp_path: Path) -> None:
    folder, text = with_text(tmp_path)
    windows = stream_of(text)
    held = torch.arange(len(windows)) % 8 == 7
    plain = compress_folder(folder, tmp_path / "plain", QUARTER)
    options = CalibrationOptions((str(text),), 10**6)
    outcome = compress_folder(folder, tmp_path / "out", QUARTER, options)
    dense = load(folder)
    inputs = inputs_of(dense, windows[~held])
    better = []
    for name, module in linears(dense).items():
        x, w = inputs[name], module.weight.double()
        y = x @ w.T
        rank = outcome.ranks[".".join(name.split(".")[-2:])]
        s = torch.linalg.svdvals(y)  # the best that any rank can do: Eckart and Young, of outputs
        best = float(s[rank:].norm() / s.norm())
        assert outcome.errors[name] == pytest.approx(best, rel=2e-3), name
        u, d, vh = torch.linalg.svd(w, full_matrices=False)
        product = (u[:, :rank] * d[:rank]) @ vh[:rank]
        better.append(best / float((y - x @ product.T).norm() / y.norm()))
        assert plain.errors[name] == pytest.approx(float(d[rank:].norm() / d.norm()), rel=1e-6)
    assert max(better) <= 1 and np.mean(better) < 0.9
    assert outcome.perplexities is not None
    factorized = load(tmp_path / "out")
    for model, found in zip((dense, factorized), outcome.perplexities, strict=True):
        loss = float(model(windows[held], labels=windows[held]).loss)
        assert found == pytest.approx(np.exp(loss), rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity of this model | {outcome.perplexities[1]:.6g} |" in card
    assert "| made of | dense (llama, 2 layers) |" in card and "self_attn.q_proj 8" in card


@torch.no_grad()
def test_a_data_folder_calibrates_like_the_text_it_was_made_of(tmp_path: Path) -> None:
    folder, _ = with_text(tmp_path)
    write_data(tmp_path / "data")
    options = CalibrationOptions((str(tmp_path / "data"),), 4096)
    outcome = compress_folder(folder, tmp_path / "out", FULL, options)
    assert outcome.perplexities is not None
    assert outcome.perplexities[0] == pytest.approx(outcome.perplexities[1], rel=1e-5)
    write_data(tmp_path / "other", prefix="v")
    with pytest.raises(UserError, match="made with another tokenizer than the model in"):
        compress_folder(
            folder, tmp_path / "no", FULL, CalibrationOptions((str(tmp_path / "other"),), 4096)
        )


def test_the_tokenizer_is_copied_and_the_command_says_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = with_text(tmp_path)
    output = tmp_path / "out"
    words = [folder, "--output", output, "--rank-share", "0.5", "--calibration", text]
    factorize_command(list(map(str, words)))
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(output)("w5 w9")["input_ids"] == [5, 9]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("parameters: ") and lines[-1] == f"written: {output}"
    assert any(line.startswith("perplexity of text kept apart: ") for line in lines)


# -- mistakes ------------------------------------------------------------------------------


def edit_config(**values: Any) -> Any:
    """Change config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def edit_weights(change: Any) -> Any:
    """Change the tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(folder: Path) -> None:
    """Lose the end of the weights."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


Q = "model.layers.1.self_attn.q_proj.weight"
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), {}, "give a folder with"),
    "architecture": (
        edit_config(model_type="mamba"),
        {},
        "architecture 'mamba' cannot be factorized; those that can: llama, mistral",
    ),
    "factorized": (edit_config(model_type="megalr_llama"), {}, "is factorized already"),
    "quantized": (
        edit_config(quantization_config={"quant_method": "fp8"}),
        {},
        "the weights are quantized",
    ),
    "whole numbers": (
        edit_weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)})),
        {},
        "q_proj.weight has dtype I8",
    ),
    "damaged": (cut, {}, "cannot be read"),
    "lacking": (edit_weights(lambda tensors: tensors.pop(Q)), {}, f"lacks {Q}"),
    "foreign": (
        edit_weights(lambda tensors: tensors.update({"model.x": torch.ones(2)})),
        {},
        "also holds model.x",
    ),
    "size": (
        edit_weights(lambda tensors: tensors.update({Q: torch.ones(3, 3)})),
        {},
        r"q_proj.weight has shape \(3, 3\), config.json says \(32, 32\)",
    ),
    "not finite": (
        edit_weights(lambda tensors: tensors[Q].fill_(torch.nan)),
        {},
        "numbers that are not finite",
    ),
    "no rank": (None, {}, "give either --rank or --rank_share"),
    "two ranks": (None, {"rank": 2, "rank_share": 0.5}, "give either --rank or --rank_share"),
    "share": (None, {"rank_share": 1.5}, "--rank_share 1.5: must be above 0 and at most 1"),
    "rank": (
        None,
        {"rank": 17},
        r"--rank 17: self_attn.k_proj is 16 x 32, so its rank is 1 to 16",
    ),
    "zero": (None, {"rank": 0}, "--rank 0: self_attn.q_proj is 32 x 32"),
    "target": (None, {"rank": 2, "targets": ("w1",)}, "--targets w1: a block has no such linear"),
    "overflow": (
        edit_weights(lambda tensors: tensors["model.norm.weight"].fill_(1e6)),
        {"rank": 2, "dtype": "float16"},
        "model.norm.weight: too large for torch.float16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_one_line_and_leave_nothing(mistake: str, tmp_path: Path) -> None:
    change, options, message = MISTAKES[mistake]
    folder = saved(tmp_path / "dense")
    if change is not None:
        change(folder)
        options = options or {"rank": 2}
    with pytest.raises(UserError, match=message) as caught:
        compress_folder(folder, tmp_path / "out", CompressionOptions(**options))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "qwen2")
    head = {"lm_head.weight": torch.ones(101, 32)}
    edit_weights(lambda tensors: tensors.update(head))(folder)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        compress_folder(folder, tmp_path / "out", QUARTER)


@pytest.mark.parametrize(
    "text, tokens, message",
    [
        ("text.txt", 64, "32 tokens .* for inputs of 44 numbers, of mlp.down_proj: give more text"),
        ("text.txt", 0, "0 tokens .* for inputs of 44 numbers"),
        ("none.txt", 4096, "none.txt"),
    ],
)
def test_too_little_text_is_refused(text: str, tokens: int, message: str, tmp_path: Path) -> None:
    folder, _ = with_text(tmp_path)
    options = CalibrationOptions((str(tmp_path / text),), tokens)
    with pytest.raises(UserError, match=message):
        compress_folder(folder, tmp_path / "out", QUARTER, options)
    assert not (tmp_path / "out").exists()


def test_text_needs_the_models_tokenizer_and_the_folder_a_new_place(tmp_path: Path) -> None:
    folder, text = with_text(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(UserError, match="holds no tokenizer to read text with"):
        compress_folder(folder, tmp_path / "out", QUARTER, CalibrationOptions((str(text),), 4096))
    outcome = compress_folder(folder, tmp_path / "out", QUARTER)
    assert outcome.notes == [f"{folder} holds no tokenizer, so none was written"]
    with pytest.raises(UserError, match="is not an empty folder"):
        compress_folder(folder, tmp_path / "out", QUARTER)
