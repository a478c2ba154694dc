"""Sampled text against loops over the decoder's own logits, and against transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megalr.hf.auto  # noqa: F401
from megalr.cli.main import main
from megalr.errors import UserError
from megalr.evaluation.generate import fill_buffers
from megalr.hf.export_run import export_run
from megalr.hf.modeling_factorized import TRANSFORMERS
from megalr.hf.trained_run import load_decoder, open_verified
from tests.hf.data import write_data
from tests.ranks import run_distributed
from tests.synthetic import VOCAB_SIZE
from tests.training.runs import run, settings, zero
from tests.training.test_methods import METHODS

SHORT = {"train": {"updates": 4}, "schedule": {"warmup_updates": 0}, "checkpoint": {"every": 2}}
IDS, EOS = [5, 9, 3], 1
PROMPT = "w5 w9 w3"


@pytest.fixture(scope="module", params=["low_rank", "cola"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after 2 and 4 updates; CoLA's can be exported factorized only."""
    home = tmp_path_factory.mktemp(request.param)
    method = METHODS.get(request.param, {})
    values = settings(home / "run", write_data(home / "data"), **{**method, **SHORT})
    run_distributed(run, 1, values, zero(1))
    return home / "run"


def continued(folder: Path, tag: str, count: int, temperature: float, top_p: float) -> str:
    """The prompt continued by the decoder alone: its logits, one token after the other."""
    decoder = load_decoder(folder, open_verified(folder, tag))
    torch.manual_seed(3)
    ids = list(IDS)
    for _ in range(count):
        with torch.no_grad():
            z = decoder(torch.tensor([ids]))[0, -1].float()  # (V,)
        z[VOCAB_SIZE:] = -torch.inf  # no text
        if temperature == 0:
            ids.append(int(z.argmax()))
        else:
            p, order = (z / temperature).softmax(-1).sort(descending=True)
            p[p.cumsum(-1) - p >= top_p] = 0  # those before it are enough
            p = torch.zeros_like(p).scatter(0, order, p)
            ids.append(int(torch.multinomial(p / p.sum(), 1)))
        if ids[-1] == EOS:
            ids.pop()
            break
    return " ".join(f"w{number}" for number in ids)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main(["generate", *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (1, 1), (0.7, 1), (1, 0.5)])
@pytest.mark.parametrize("tag", ["update_2", "update_4"])
def test_text_of_a_run_follows_from_the_decoders_logits(
    folder: Path, tag: str, temperature: float, top_p: float, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", folder, "--tag", tag, "--prompt", PROMPT, "--max_new_tokens", 8]
    sampling = ["--temperature", temperature, "--top_p", top_p, "--seed", 3]
    text = printed(capsys, *words, *sampling)
    assert text == continued(folder, tag, 8, temperature, top_p) + "\n"


def test_an_exported_folder_writes_what_transformers_writes_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = "factorized" if "cola" in str(folder.parent.name) else "dense"
    export_run(folder, None, tmp_path / "out", "float32", "5GB", None, form)
    capsys.readouterr()  # its notes
    options = ["--max-new-tokens=8", "--temperature", "0"]
    text = printed(capsys, "--model", tmp_path / "out", "--prompt", PROMPT, "w7", *options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = []
    for prompt in (PROMPT, "w7"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
        expected.append(tokenizer.decode(found).removesuffix(" w1") + "\n")
    assert text == "\n".join(expected)
    assert printed(capsys, "--run", folder, "--prompt", PROMPT, *options) == expected[0]


@pytest.mark.parametrize("family", list(TRANSFORMERS))
def test_buffers_of_every_family_are_those_of_a_new_model(family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0}
    config_class, _, causal = TRANSFORMERS[family]
    config = config_class(**sizes, **heads, vocab_size=64, pad_token_id=0)
    with torch.device("meta"):
        model = causal._from_config(config)
    fill_buffers(model)
    expected = dict(causal(config).named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_empty_prompt_begins_a_document(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "--run", folder, "--prompt", "", "--max_new_tokens", 3)
    assert set(text.split()) <= {f"w{number}" for number in range(VOCAB_SIZE)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "x", "--temperature", "-1"], "--temperature is -1.0: give 0 or more"),
        (["--run", "x", "--top_p", "0"], "--top_p is 0.0: give more than 0, at most 1"),
        (["--model", "x", "--tag", "update_2"], "--tag update_2 belongs to --run"),
        (["--model", "nowhere"], "nowhere holds no config.json"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(["generate", "--prompt", PROMPT, *words])
    assert "\n" not in str(caught.value)
