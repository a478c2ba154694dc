"""A factorized folder: the decoder's function, by transformers' own code, without megalr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import megalr.hf.auto  # noqa: F401  (loads factorized folders without trust_remote_code)
from megalr.errors import UserError
from megalr.hf.export_run import count_padding
from megalr.hf.factorized import factorization, factorized_tensors
from megalr.hf.families import families_of, transformers_config
from megalr.hf.modeling_factorized import FACTORIZED, SparseEntries
from megalr.hf.pretrained_config import load_config
from megalr.hf.write import ExportOptions, write_model
from megalr.layers.linear import FactorizedLinear
from megalr.models.decoder import Decoder
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.damage import mutated_json
from tests.hf.models import FAMILIES, lively
from tests.models.settings import factorized, low_rank, mixed
from tests.preprocessing.corpus import VOCAB_SIZE, prose, tiny_tokenizer

METHODS = {
    "low_rank": low_rank(),
    "low_rank of mixed ranks": mixed(low_rank()),
    "sltrain of mixed ranks": mixed(factorized("sltrain")),
    "cola of mixed ranks": mixed(factorized("cola")),
    **{name: factorized(name) for name in ("loro", "sltrain", "lora", "relora", "cola")},
    "dlr": low_rank(dlr_alpha=0.7),
    "dlr_cola": factorized("cola", dlr_alpha=0.7),
}
ODD_SCALE = low_rank(alpha=11.0)
"""alpha / rank = 11/8 is no power of two."""


def write(decoder: Decoder, output: Path, dtype: str = "float32", form: str = "factorized") -> Path:
    """Export a decoder without a tokenizer."""
    write_model(decoder, output, ExportOptions(dtype, "30KB", 64, form=form), None, "card")
    return output


def load(folder: Path, **options: Any) -> Any:
    """The causal language model in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def sample(batch: int = 2, length: int = 20) -> torch.Tensor:
    """Token ids, the same in every test."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 101, (batch, length), generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_decoders_and_the_dense_exports(
    family: str, method: str, tmp_path: Path
) -> None:
    decoder = lively(METHODS[method], **FAMILIES[family][0])
    model = load(write(decoder, tmp_path / "factors"))
    name = families_of(decoder.config)[0]
    assert type(model) is FACTORIZED[name][2] and model.config.model_type == f"megalr_{name}"
    ids = sample()
    logits = model(ids).logits
    assert float(logits.std()) > 0.01
    torch.testing.assert_close(logits, decoder(ids), atol=1e-5, rtol=1e-5)
    if METHODS[method].name != "cola":
        dense = load(write(decoder, tmp_path / "dense", form="dense"))
        torch.testing.assert_close(logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_padding_that_is_kept_leaves_the_function(family: str, method: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 83, "pad_multiple": 16}
    decoder = lively(METHODS[method], **{**FAMILIES[family][0], **sizes})
    without = load(write(decoder, tmp_path / "without"))
    count_padding(decoder)
    forms = ["factorized", *(["dense"] if METHODS[method].name != "cola" else [])]
    for form in forms:
        model = load(write(decoder, tmp_path / form, form=form))
        width = "n_inner" if family == "gpt2" else "intermediate_size"
        assert (getattr(without.config, width), getattr(model.config, width)) == (83, 96)
        logits = model(sample()).logits
        torch.testing.assert_close(logits, without(sample()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_generation_of_a_padded_batch_is_that_of_the_dense_export(
    family: str, attention: str, tmp_path: Path
) -> None:
    decoder = lively(ODD_SCALE, **FAMILIES[family][0])
    ids = sample(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :7] = 0  # prompts of 9, 5 and 2 tokens, padded on the left
    found = []
    for form in ("factorized", "dense"):
        model = load(write(decoder, tmp_path / form, form=form), attn_implementation=attention)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        found.append(model.generate(ids * mask, attention_mask=mask, **options))
        for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
            other = model.generate(ids * mask, attention_mask=mask, **cache, **options)
            assert torch.equal(found[-1], other)
    assert torch.equal(*found)


def test_every_tensor_is_rounded_once_and_positions_stay_whole_numbers(tmp_path: Path) -> None:
    decoder = lively(factorized("sltrain"))
    folder = write(decoder, tmp_path / "out", "bfloat16")
    settings = factorization(decoder, "llama")
    expected = dict(factorized_tensors(decoder, "llama", settings))
    for dtype in ("auto", torch.bfloat16):
        state = load(folder, dtype=dtype).state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            whole = name.endswith("positions")
            assert state[name].dtype is (torch.int32 if whole else torch.bfloat16)
            assert torch.equal(state[name], tensor if whole else tensor.bfloat16())
    layer = decoder.blocks()[0].attention.o
    assert isinstance(layer, FactorizedLinear)
    b = expected["model.layers.0.self_attn.o_proj.b.weight"]
    torch.testing.assert_close(b, layer.scale * layer.b.detach(), rtol=1e-7, atol=0)
    assert not any(name.endswith("_proj.weight") for name in expected)


@torch.no_grad()
def test_one_matrix_of_all_factors_a_of_an_input_is_the_same_as_several(tmp_path: Path) -> None:
    decoder = lively(factorized("cola"), **FAMILIES["qwen2"][0])
    models = []
    for shared in (True, False):
        config = transformers_config(decoder.config, "qwen2", 64, factorized=True)
        config.factorization = factorization(decoder, "qwen2", shared)
        model = FACTORIZED["qwen2"][2](config).eval()
        tensors = dict(factorized_tensors(decoder, "qwen2", config.factorization))
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        models.append(model)
    assert models[0].model.layers[0].self_attn.shared_a.weight.shape == (24, 48)
    assert not hasattr(models[1].model.layers[0].self_attn, "shared_a")
    logits = [model(sample()).logits for model in models]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits[0], decoder(sample()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_sparse_products_and_gradients_are_those_of_the_dense_matrix(tokens: int) -> None:
    torch.manual_seed(0)
    layer = SparseEntries(30, 20, 60).double()
    torch.nn.init.normal_(layer.values)
    layer.positions.copy_(torch.randperm(600)[:60])
    x = torch.randn(tokens, 20, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(600, dtype=torch.float64)
    dense[layer.positions.long()] = layer.values.detach()
    dense = dense.view(30, 20).requires_grad_()
    weights = torch.randn(tokens, 30, dtype=torch.float64)
    y = layer(x)
    (y * weights).sum().backward()
    (grad,) = torch.autograd.grad((x.detach() @ dense.T * weights).sum(), dense)
    tolerance = {"atol": 1e-5, "rtol": 1e-5}  # few tokens are summed in float32
    torch.testing.assert_close(y, x @ dense.T, **tolerance)
    torch.testing.assert_close(x.grad, weights @ dense, **tolerance)
    torch.testing.assert_close(
        layer.values.grad, grad.flatten()[layer.positions.long()], **tolerance
    )


@pytest.mark.parametrize("method", ["low_rank", "sltrain", "cola", "lora"])
def test_the_model_compiles_as_one_graph(method: str, tmp_path: Path) -> None:
    model = load(write(lively(METHODS[method]), tmp_path / "out"))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        logits = compiled(sample(), use_cache=False).logits
        torch.testing.assert_close(logits, model(sample()).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["low_rank", "sltrain"])
def test_a_saved_model_is_the_same_bit_for_bit(method: str, tmp_path: Path) -> None:
    folder = write(lively(METHODS[method], tie_embeddings=True), tmp_path / "out")
    first = load(folder)
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    assert first.config.factorization == second.config.factorization
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    code = "modeling_factorized.py"
    assert (tmp_path / "again" / code).read_text() == (folder / code).read_text()
    maps = [
        json.loads((f / "config.json").read_text())["auto_map"]
        for f in (folder, tmp_path / "again")
    ]
    assert maps[0] == maps[1] and set(maps[0]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }


WITHOUT_MEGALR = """
import sys
sys.modules["megalr"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
ids = torch.arange(2, 22).view(2, 10)
hidden = AutoModel.from_pretrained(source, trust_remote_code=True).eval()(ids).last_hidden_state
model.save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True).eval()
tokens = again.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
found = model(ids).logits.detach(), model.lm_head(hidden).detach(), tokens
torch.save(found, target + "/found.pt")
"""


@pytest.mark.parametrize(
    "family, method",
    [("llama", "low_rank"), pytest.param("gpt2", "sltrain", marks=pytest.mark.long)],
)
def test_the_folder_alone_is_enough(family: str, method: str, tmp_path: Path) -> None:
    decoder = lively(METHODS[method], **FAMILIES[family][0])
    folder = write(decoder, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEGALR, str(folder), str(tmp_path / "again")],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    logits, from_base, tokens = torch.load(tmp_path / "again" / "found.pt")
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(logits, decoder(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_base, logits, atol=1e-6, rtol=1e-5)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, decoder(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_tokenizer_of_a_factorized_folder_is_trainings(family: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    decoder = lively(low_rank(), **{**FAMILIES[family][0], "vocab_size": VOCAB_SIZE})
    options = ExportOptions("float32", "5GB", 64, form="factorized")
    write_model(decoder, tmp_path / "out", options, tokenizer, "card")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = prose(20, seed=5)
    ids, lengths = tokenizer.encode(texts, append_eos=False)
    assert [len(exported(text)["input_ids"]) for text in texts] == lengths.tolist()
    assert exported(texts[0])["input_ids"] == ids[: lengths[0]].tolist()
    assert load(tmp_path / "out").config.eos_token_id == tokenizer.eos_id


def edited(folder: Path, change: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _first(config: dict[str, Any], **values: Any) -> None:
    config["factorization"]["modules"]["self_attn.o_proj"].update(values)


MISTAKES: dict[str, tuple[Any, str]] = {
    "version": (
        lambda config: config["factorization"].update(transformers="99.1"),
        r"needs transformers 99\.1 or later, not 5\.\d+",
    ),
    "smaller rank": (
        lambda config: _first(config, rank=7),
        r"o_proj.*has shape \(.*\), config.json says \(.*7.*\)",
    ),
    "rank": (lambda config: _first(config, rank=49), "o_proj has rank 49: must be 1 to 48"),
    "ranks of more blocks": (
        lambda config: _first(config, rank=[8, 8, 8]),
        r"o_proj has rank \[8, 8, 8\]: must be 1 to 48",
    ),
    "ranks of more matrices": (
        lambda config: _first(config, rank=[8, [8, 8]]),
        r"o_proj has rank \[8, \[8, 8\]\]: must be 1 to 48",
    ),
    "no number": (lambda config: _first(config, rank="8"), "o_proj has rank '8'"),
    "activation": (
        lambda config: config["factorization"]["modules"].update({"mlp.act_fn": {"rank": 8}}),
        "names 'mlp.act_fn', which is no linear layer",
    ),
    "entries": (
        lambda config: config["factorization"].update(form="sparse", shared=False),
        r"has entries None: must be 1 to \d+",
    ),
    "form": (
        lambda config: config["factorization"].update(form="tucker"),
        "form 'tucker'.*must be one of product, silu, sparse, base",
    ),
    "form without its tensors": (
        lambda config: config["factorization"].update(form="base", shared=False),
        "weight is missing from the weights",
    ),
    "another layer": (
        lambda config: config["factorization"]["modules"].update({"mlp.w1": {"rank": 8}}),
        "names 'mlp.w1', which is no linear layer of a LlamaDecoderLayer",
    ),
    "a dense layer": (
        lambda config: config["factorization"]["modules"].pop("mlp.down_proj"),
        "mlp.down_proj.weight is missing from the weights",
    ),
    "nothing": (lambda config: config.pop("factorization"), "has no factorization with modules"),
    "quantized": (
        lambda config: config.update(quantization_config={"quant_method": "fp8"}),
        "factors cannot be quantized",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(mistake: str, tmp_path: Path) -> None:
    change, message = MISTAKES[mistake]
    folder = write(lively(low_rank()), tmp_path / "out")
    edited(folder, change)
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_mutated_settings_are_refused_in_one_line_or_change_nothing(tmp_path: Path) -> None:
    folder = write(lively(factorized("sltrain")), tmp_path / "out")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    logits = load(folder)(sample()).logits
    refused = 0
    for seed in range(60):
        changed = {**config, "factorization": mutated_json(config["factorization"], seed)}
        path.write_text(json.dumps(changed))
        try:
            model = load(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(model(sample()).logits, logits)
    assert refused > 30


@pytest.mark.parametrize(
    "method, form", [("cola", "silu"), ("sltrain", "sparse"), ("lora", "base")]
)
def test_training_starts_from_products_of_two_factors_only(
    method: str, form: str, tmp_path: Path
) -> None:
    folder = write(lively(METHODS[method]), tmp_path / "out")
    with pytest.raises(UserError, match=rf"export of form {form} cannot be read, .* --form dense"):
        load_config(folder)


def test_frozen_matrices_are_not_ignored(tmp_path: Path) -> None:
    folder = write(lively(factorized("lora")), tmp_path / "out")
    edited(folder, lambda config: config["factorization"].update(form="product"))
    with pytest.raises(ValueError, match=r"base\.weight is not in the model of config\.json"):
        load(folder)


def test_a_vocabulary_may_be_replaced_if_the_user_says_so(tmp_path: Path) -> None:
    folder = write(lively(low_rank()), tmp_path / "out")
    edited(folder, lambda config: config.update(vocab_size=120))
    model = load(folder, ignore_mismatched_sizes=True)
    assert model(sample()).logits.shape == (2, 20, 120)
    with pytest.raises(ValueError, match=r"has shape \(101, 48\), config.json says \(120, 48\)"):
        AutoModel.from_pretrained(folder)


def test_files_hold_factors_only(tmp_path: Path) -> None:
    folder = write(lively(low_rank()), tmp_path / "out")
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    layer = {
        n.removeprefix("model.layers.0."): tuple(t.shape) for n, t in stored.items() if ".0." in n
    }
    assert layer == {
        "input_layernorm.weight": (48,),
        "post_attention_layernorm.weight": (48,),
        "self_attn.shared_a.weight": (24, 48),
        "self_attn.q_proj.b.weight": (48, 8),
        "self_attn.k_proj.b.weight": (16, 8),
        "self_attn.v_proj.b.weight": (16, 8),
        "self_attn.o_proj.a.weight": (8, 48),
        "self_attn.o_proj.b.weight": (48, 8),
        "mlp.shared_a.weight": (16, 48),
        "mlp.gate_proj.b.weight": (83, 8),
        "mlp.up_proj.b.weight": (83, 8),
        "mlp.down_proj.a.weight": (8, 83),
        "mlp.down_proj.b.weight": (48, 8),
    }
