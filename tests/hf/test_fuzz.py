"""Damaged and hostile files of a transformers folder: one line, no traceback, nothing misread."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalr.errors import UserError
from megalr.hf.compare_logits import check_same_function
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.read import open_weights
from megalr.hf.write import ExportOptions, write_model
from megalr.models.config import decoder_config
from megalr.preprocessing.compare_tokenizers import PROBES
from megalr.preprocessing.tokenizer import open_tokenizer
from tests.hf.data import write_tokenizer
from tests.hf.models import FAMILIES, lively
from tests.models.settings import full_rank
from tests.preprocessing.corpus import tiny_tokenizer

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**9,
    10**30,
    0.5,
    -0.0,
    1e-6,
    1e300,
    "",
    "2",
    "silu",
    "../x",
    "llama",
    "\u0000",
    "x" * 5000,
    [],
    [1],
    ["full_attention", "sliding_attention"],
    {},
    {"a": {}},
    {"rope_type": "linear", "factor": 2.0},
    [[[[[[]]]]]],
]
KEYS = ["head_dim", "layer_types", "rope_scaling", "auto_map", "num_layers", "dtype", "torch_dtype"]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A copy with one value somewhere inside replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    place: Any = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        action = draw.random()
        if action < 0.65:
            place[key] = draw.choice(ODD)
        elif action < 0.8:
            del place[key]
        elif isinstance(place, dict) and action < 0.9:
            place[draw.choice(KEYS)] = draw.choice(ODD)
        elif isinstance(place, dict):
            place[f"{key}x"] = place.pop(key)
        else:
            place.append(draw.choice(ODD))
        break
    return value


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """A truncation, a changed byte, a repeated or a removed part."""
    position, other = sorted(draw.randrange(len(content)) for _ in range(2))
    return draw.choice(
        [
            content[:position],
            content[:position] + bytes([draw.randrange(256)]) + content[position + 1 :],
            content[:other] + content[position:],
            content[:position] + content[other:],
        ]
    )


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged versions of a JSON file."""
    draw = random.Random(seed)
    parsed = json.loads(content)
    for _ in range(count):
        if draw.random() < 0.7:
            yield json.dumps(mutated_value(parsed, draw)).encode()
        else:
            yield mutated_bytes(content, draw)


def outcome(action: Callable[[], Any]) -> Any:
    """What the action returns, or the UserError it raises, which must be one short line."""
    try:
        return action()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1500, text
        return error


def _read(folder: Path) -> float:
    sizes = decoder_config(None, pretrained_sizes(folder))
    open_weights(folder, sizes)
    return check_same_function(folder, sizes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models in one file and in several."""
    home = tmp_path_factory.mktemp("models")
    for family, size in (("llama", "5GB"), ("mistral", "5GB"), ("qwen2_window", "40KB")):
        decoder = lively(full_rank(), **FAMILIES[family][0])
        write_model(decoder, home / family, ExportOptions("float32", size, 64), None, "card")
    return home


def _cases(count: int, *marks: Any) -> list[Any]:
    files = [(family, "config.json") for family in ("llama", "mistral", "qwen2_window")]
    files.append(("qwen2_window", "model.safetensors.index.json"))
    return [pytest.param(family, name, count, marks=marks) for family, name in files]


@pytest.mark.parametrize("family, name, count", [*_cases(40), *_cases(200, pytest.mark.long)])
def test_a_mutation_is_refused_in_one_line_or_computes_what_transformers_computes(
    family: str, name: str, count: int, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / family, folder)
    content = (folder / name).read_bytes()
    accepted = refused = 0
    for changed in mutations(content, count, seed=len(family) + count):
        (folder / name).write_bytes(changed)
        found = outcome(lambda: _read(folder))
        if isinstance(found, UserError):
            refused += 1
        else:
            assert found < 1e-6, changed
            accepted += 1
    assert refused > count // 4 and accepted + refused == count


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_mutated_tokenizer_is_refused_in_one_line_or_encodes(name: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    content = (folder / name).read_bytes()
    for changed in mutations(content, 120, seed=5):
        (folder / name).write_bytes(changed)
        tokenizer = outcome(lambda: open_tokenizer(folder))
        if not isinstance(tokenizer, UserError):
            ids = outcome(lambda t=tokenizer: t.encode(list(PROBES), False)[0])
            assert isinstance(ids, UserError) or all(0 <= n < tokenizer.vocab_size for n in ids)


def test_a_mutated_sentencepiece_model_is_refused_in_one_line_or_encodes(tmp_path: Path) -> None:
    content = (tiny_tokenizer() / "spiece.model").read_bytes()
    draw = random.Random(3)
    for _ in range(150):
        (tmp_path / "m.model").write_bytes(mutated_bytes(content, draw))
        tokenizer = outcome(lambda: open_tokenizer(tmp_path / "m.model"))
        if not isinstance(tokenizer, UserError):
            ids = outcome(lambda t=tokenizer: t.encode(list(PROBES), False)[0])
            assert isinstance(ids, UserError) or all(0 <= n < tokenizer.vocab_size for n in ids)
            outcome(lambda t=tokenizer: t.copy_to(tmp_path / "copy"))
