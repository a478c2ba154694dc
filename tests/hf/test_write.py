"""What transformers loads from an exported folder computes what the decoder computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalr.errors import UserError
from megalr.hf.names import dense_state_dict
from megalr.hf.write import ExportOptions, write_model
from megalr.models.decoder import Decoder
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.hf.models import FAMILIES, lively
from tests.models.settings import factorized, full_rank, low_rank
from tests.preprocessing.corpus import VOCAB_SIZE, prose, tiny_tokenizer

METHODS = {
    "full_rank": full_rank(),
    "low_rank": low_rank(),
    **{name: factorized(name) for name in ("loro", "sltrain", "lora", "relora")},
}


def _write(decoder: Decoder, output: Path, dtype: str = "float32", size: str = "5GB") -> None:
    write_model(decoder, output, ExportOptions(dtype, size, 64), None, "card")


def _greedy(decoder: Decoder, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, decoder(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_the_decoders_logits(family: str, tmp_path: Path) -> None:
    changes, architecture = FAMILIES[family]
    decoder = lively(full_rank(), **changes)
    _write(decoder, tmp_path / "out", size="30KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == architecture
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    ids = torch.randint(0, 101, (2, 20))
    assert float(decoder(ids).std()) > 0.01
    torch.testing.assert_close(model(ids).logits, decoder(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_method_gives_dense_weights_with_the_decoders_logits_and_generates(
    method: str, tmp_path: Path
) -> None:
    decoder = lively(METHODS[method])
    _write(decoder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.vocab_size == 101 and model.config.intermediate_size == 83  # no padding
    ids = torch.randint(0, 101, (2, 20))
    torch.testing.assert_close(model(ids).logits, decoder(ids), atol=1e-5, rtol=1e-5)
    generated = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, _greedy(decoder, ids[:, :5], 8))


def test_factors_are_multiplied_in_float32_and_rounded_once(tmp_path: Path) -> None:
    decoder = lively(factorized("sltrain"))
    _write(decoder, tmp_path / "out", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = {name: tensor.bfloat16() for name, tensor in dense_state_dict(decoder).items()}
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    def refused(decoder: Decoder, message: str, dtype: str = "float32") -> None:
        with pytest.raises(UserError, match=message) as caught:
            _write(decoder, tmp_path / "out", dtype)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused(lively(factorized("cola")), "CoLA layer, whose function is not a matrix")
    refused(
        lively(full_rank(), gated_mlp=False),
        "an MLP without a gate.* matches none of transformers' architectures qwen2, qwen3",
    )
    large = lively(full_rank())
    large.embedding.weight.data[3, 5] = 1e5
    refused(large, "embed_tokens.weight: its weights are too large for float16", "float16")
    large.embedding.weight.data[3, 5] = float("nan")
    refused(large, "not finite: the run diverged.*--tag")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        _write(lively(full_rank()), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"cannot be written .*nothing was left there"):
        _write(lively(full_rank()), tmp_path / "out" / "thesis.tex" / "out")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(lively(full_rank()), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_sentencepiece_tokenizer_gives_the_same_ids_from_the_exported_folder(
    family: str, tmp_path: Path
) -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    decoder = lively(full_rank(), **{**FAMILIES[family][0], "vocab_size": VOCAB_SIZE})
    options = ExportOptions("float32", "5GB", 64)
    write_model(decoder, tmp_path / "out", options, tokenizer, "card")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*prose(20, seed=5), "  two  spaces ", "</s> spelt out"][:21]
    ids, lengths = tokenizer.encode(texts, append_eos=False)
    starts = [0, *lengths.cumsum().tolist()]
    for text, start, stop in zip(texts, starts, starts[1:], strict=False):
        assert exported(text)["input_ids"] == ids[start:stop].tolist()
    assert exported.eos_token_id == tokenizer.eos_id
    assert open_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    # AutoTokenizer of transformers 5.23, not of 5.0, would replace it in a qwen2 folder.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type in {"qwen2": ("llama", "qwen2")}.get(family, (family,))
    sample = torch.randint(0, VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(sample).logits, decoder(sample), atol=1e-5, rtol=1e-5)


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path: Path) -> None:
    decoder = lively(
        full_rank(), vocab_size=VOCAB_SIZE, attention_bias=True, sliding_window=5
    )  # qwen2 only
    options = ExportOptions("float32", "5GB", 64)
    tokenizer = open_tokenizer(tiny_tokenizer())
    try:
        write_model(decoder, tmp_path / "out", options, tokenizer, "card")
    except UserError as error:
        assert "another tokenizer from a qwen2 folder" in str(error) and "\n" not in str(error)
        assert list(tmp_path.iterdir()) == []
    else:  # transformers 5.0 does not replace it
        exported = AutoTokenizer.from_pretrained(tmp_path / "out")
        ids = tokenizer.encode(["a word"], append_eos=False)[0]
        assert exported("a word")["input_ids"] == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_prompt_gets_no_eos_and_generation_goes_on_from_it(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    open_tokenizer(tiny_tokenizer()).copy_to(source)
    if kind == "huggingface":  # one that appends EOS itself, as T5's
        config = json.loads((source / "tokenizer_config.json").read_text())
        del config["sentencepiece_model"]
        (source / "tokenizer_config.json").write_text(json.dumps({**config, "add_eos_token": True}))
        fast = Tokenizer.from_file(str(source / "tokenizer.json"))
        fast.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
        fast.save(str(source / "tokenizer.json"))
        (source / "spiece.model").unlink()
        assert AutoTokenizer.from_pretrained(source)("a word")["input_ids"][-1] == 1
    tokenizer = open_tokenizer(source)
    assert tokenizer.kind == kind
    decoder = lively(full_rank(), vocab_size=VOCAB_SIZE)
    write_model(decoder, tmp_path / "out", ExportOptions("float32", "5GB", 64), tokenizer, "card")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.model_max_length == 64
    prompt = exported("Kalo the vor", return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == tokenizer.encode(["Kalo the vor"], append_eos=False)[0].tolist()
    assert exported.eos_token_id == 1 and 1 not in prompt
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, _greedy(decoder, prompt, 4))


@pytest.mark.parametrize("kind", ["char", "word"])
def test_a_sentencepiece_model_without_a_tokenizer_json_is_refused_with_the_reason(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(prose(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    decoder = lively(full_rank(), vocab_size=VOCAB_SIZE)
    options = ExportOptions("float32", "5GB", 64)
    with pytest.raises(UserError, match=f"no tokenizer.json can be made of it: .* type {kind}"):
        write_model(decoder, tmp_path / "out", options, open_tokenizer(tmp_path / "m.model"), "")
    assert not (tmp_path / "out").exists()
