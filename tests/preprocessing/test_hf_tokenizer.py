"""SentencePiece models as tokenizer.json: the ids of sentencepiece itself, or a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megalr.errors import UserError
from megalr.hf.write_tokenizer import exported_difference
from megalr.preprocessing.compare_tokenizers import tokenizer_difference
from megalr.preprocessing.hf_tokenizer import conversion_problem, is_tie
from megalr.preprocessing.split_worker import WorkSettings
from megalr.preprocessing.tokenizer import holds_tokenizer, open_tokenizer
from tests.preprocessing.corpus import prose, tiny_tokenizer

LINES = [
    *prose(30, seed=7),
    "x = 12345\ty\n\n    return 3.14\r\n",
    "  leading,   inner  and trailing  ",
    "\n\n\ttabs\t\tand<n>pieces<n><n> ing the",
    "naïve ﬁne １２ e\u0301 ½ Å",
    "漢字 😀 👍🏽 👨‍👩‍👧 \u200b\u00a0 \x07",
    "",
    "   ",
]
SYMBOLS = ["\n", "\t", "<n>", "ing the", "123"]


def _train(folder: Path, kind: str, rule: str = "identity", **options: Any) -> Path:
    text = folder / "text.txt"
    text.write_text("\n".join(prose(1500) + ["x = 12345\ty", "ﬁne １２", "f(x): return 3.14"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "m"),
        vocab_size=500,
        model_type=kind,
        normalization_rule_name=rule,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "m.model"


@pytest.mark.parametrize("symbols", [[], SYMBOLS], ids=["plain", "symbols"])
@pytest.mark.parametrize("spaces", ["collapsed", "kept"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_transformers_gives_sentencepieces_ids(
    kind: str, rule: str, spaces: str, symbols: list[str], tmp_path: Path
) -> None:
    path = _train(
        tmp_path,
        kind,
        rule,
        byte_fallback=spaces == "kept",
        remove_extra_whitespaces=spaces == "collapsed",
        user_defined_symbols=symbols,
    )
    assert conversion_problem(path) is None
    open_tokenizer(path).copy_to(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for line in LINES:
        assert theirs(line)["input_ids"] == model.encode(line), line
    for symbol in symbols[:3]:
        assert model.piece_to_id(symbol) in theirs(f"a {symbol}b")["input_ids"]


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("char", {}, "of type char, and tokenizers has unigram and bpe only"),
        ("word", {}, "of type word, and tokenizers has unigram and bpe only"),
        ("unigram", {"treat_whitespace_as_suffix": True}, "does not mark the start of words"),
    ],
)
def test_other_kinds_make_shards_but_no_tokenizer_json_and_say_why(
    kind: str, options: dict, message: str, tmp_path: Path
) -> None:
    path = _train(tmp_path, kind, **options)
    assert message in str(conversion_problem(path))
    tokenizer = open_tokenizer(path)
    tokenizer.copy_to(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert open_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def _folder(target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        shutil.copyfile(tiny_tokenizer() / name, target / name)
    return target


def test_a_folder_is_opened_in_whatever_form_it_has_its_tokenizer(tmp_path: Path) -> None:
    own = open_tokenizer(tiny_tokenizer())
    fast = _folder(tmp_path / "fast", "tokenizer.json")
    slow = _folder(tmp_path / "slow", "spiece.model")
    (slow / "spiece.model").rename(slow / "tokenizer.model")
    for folder in (fast, slow):
        assert holds_tokenizer(folder)
        assert tokenizer_difference(own, open_tokenizer(folder)) is None
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert not holds_tokenizer(tmp_path / "empty")


def test_segmentations_of_one_score_are_a_tie_beside_bytes_too() -> None:
    """Eight spaces are seven and one or one and seven, whichever the rounding of sums prefers."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    proto.trainer_spec.model_type = 1
    pieces = (
        ("<unk>", 0.0, 2),
        ("<0x09>", 0.0, 6),
        ("a", -2.1, 1),
        ("aa", -5.3, 1),
        ("b", -2.2, 1),
    )
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    assert is_tie(proto, [1, 2, 3, 1], [1, 3, 2, 1])
    assert not is_tie(proto, [1, 2, 2], [1, 3])  # another score
    assert not is_tie(proto, [1, 2, 3, 1], [1, 3, 4, 1])  # another text
    assert not is_tie(proto, [1, 2, 3], [0, 2, 3])
    assert not is_tie(proto, [2, 4], [4, 2])  # another text of the same score
    assert not is_tie(proto, [1, 2], [1, 5])  # a token that was added to it
    proto.trainer_spec.model_type = 2
    assert not is_tie(proto, [2, 3], [3, 2])


def test_rounding_of_scores_is_no_difference(tmp_path: Path) -> None:
    """SentencePiece and tokenizers take "aaa" five times and "a" once in another order."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.unk_id, trainer.eos_id = 1, True, 0, 1
    trainer.bos_id = trainer.pad_id = -1
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", True, False
    proto.pieces.add(piece="<unk>", score=0.0, type=2)
    proto.pieces.add(piece="</s>", score=0.0, type=3)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    for text, score in [("\u2581", -3.4), ("a", -4.4), ("aaa", -6.0)]:
        proto.pieces.add(piece=text, score=score, type=1)
    model = tmp_path / "m.model"
    model.write_bytes(proto.SerializeToString())
    own = open_tokenizer(model)
    own.copy_to(tmp_path / "copy")
    (tmp_path / "fast").mkdir()
    shutil.copyfile(tmp_path / "copy" / "tokenizer.json", tmp_path / "fast" / "tokenizer.json")
    loaded = open_tokenizer(tmp_path / "fast")
    assert (own.kind, loaded.kind) == ("sentencepiece", "huggingface")
    line = ["aaaaaaaaaaaaaaaa bbbbb abababab ......... -------- ========"]  # of PROBES
    assert own.encode(line, False)[0].tolist() != loaded.encode(line, False)[0].tolist()
    assert tokenizer_difference(own, loaded) is None
    assert tokenizer_difference(loaded, own) is None
    assert exported_difference(own, tmp_path / "fast") is None


def test_a_difference_is_named_by_the_first_piece_or_line(tmp_path: Path) -> None:
    own = open_tokenizer(tiny_tokenizer())
    other = _folder(tmp_path / "other", "tokenizer.json")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[300][0], vocabulary[301][0] = vocabulary[301][0], vocabulary[300][0]
    (other / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer_difference(own, open_tokenizer(other))
    assert found == f"{vocabulary[301][0]!r} is 300 there and 301 here"
    content = json.loads((tiny_tokenizer() / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer_difference(own, open_tokenizer(other))
    assert found is not None and found.startswith("\"The Cat's 123 ids")


def test_a_fingerprint_covers_what_decides_the_ids_and_no_other_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    alone = open_tokenizer(folder).fingerprint
    for name in ("generation_config.json", "model.safetensors.index.json", "training_args.json"):
        (folder / name).write_text("{}")
    assert open_tokenizer(folder).fingerprint == alone
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    inside = open_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 128}')
    assert open_tokenizer(folder).fingerprint == inside.fingerprint
    inside.copy_to(tmp_path / "copy")
    assert open_tokenizer(tmp_path / "copy").fingerprint == inside.fingerprint
    (folder / "added_tokens.json").write_text("{}")
    assert open_tokenizer(folder).fingerprint != inside.fingerprint


def test_fingerprints_of_earlier_versions_are_recognized(tmp_path: Path) -> None:
    import hashlib

    folder = _folder(tmp_path / "model", "tokenizer.json", "tokenizer_config.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["sentencepiece_model"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def former() -> str:
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    assert open_tokenizer(folder).fingerprint == former()
    (folder / "generation_config.json").write_text("{}")
    tokenizer = open_tokenizer(folder)
    assert tokenizer.fingerprint != former() and tokenizer.has_fingerprint(former())
    assert not tokenizer.has_fingerprint("0" * 64)
    settings = WorkSettings(tmp_path / "out", folder)
    own, earlier = settings.record(tokenizer.fingerprint), settings.record(former())
    assert settings.record_like(earlier, tokenizer) == earlier  # a job of before goes on
    assert settings.record_like(settings.record("0" * 64), tokenizer) == own
    assert settings.record_like(None, tokenizer) == own


def test_code_of_a_tokenizers_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run the folder's code")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    )
    with pytest.raises(UserError, match="cannot load a tokenizer") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
