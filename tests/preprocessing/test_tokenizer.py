"""Tokenizers: the ids of SentencePiece, lossless text, equality with transformers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megalr.errors import UserError
from megalr.preprocessing.tokenizer import open_tokenizer, require_eos
from megalr.preprocessing.tokenizer_training import sentences, train_tokenizer
from megalr.readers.documents import ReadOptions
from tests.preprocessing.corpus import VOCAB_SIZE, prose, tiny_tokenizer, write_jsonl

TEXTS = [
    *prose(50),
    " leading and  double   spaces ",
    "tab\tline\n\nbreaks\r\n",
    "unseen: 漢字 😀 \x07",
    "",
    "   ",
]


def test_ids_are_sentencepieces_and_documents_are_concatenated() -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    model = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer() / "spiece.model"))
    ids, lengths = tokenizer.encode(TEXTS, append_eos=True)
    expected = [[*model.encode(text), 1] for text in TEXTS]
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [token for row in expected for token in row]
    bare, _ = tokenizer.encode(TEXTS, append_eos=False)
    assert bare.tolist() == [token for row in expected for token in row[:-1]]
    assert tokenizer.encode([], append_eos=True)[0].tolist() == []


def test_special_ids_are_t5s() -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    model = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer() / "spiece.model"))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, VOCAB_SIZE)
    assert (model.unk_id(), model.bos_id()) == (2, -1)


def test_text_survives_encoding_and_decoding_unchanged() -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    for text in TEXTS:
        ids, _ = tokenizer.encode([text], append_eos=False)
        assert tokenizer.decode(ids.tolist()) == text
        assert 2 not in ids  # never unknown: bytes instead


def test_transformers_loads_the_folder_and_gives_the_same_ids_and_text() -> None:
    ours, theirs = open_tokenizer(tiny_tokenizer()), AutoTokenizer.from_pretrained(tiny_tokenizer())
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 0, VOCAB_SIZE)
    for text in TEXTS:
        ids = ours.encode([text], append_eos=False)[0].tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_one_model_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    bare = shutil.copyfile(tiny_tokenizer() / "spiece.model", tmp_path / "x.model")
    assert open_tokenizer(bare).fingerprint == tokenizer.fingerprint
    tokenizer.copy_to(tmp_path / "copy")
    assert open_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_a_hugging_face_folder_works_and_a_document_cannot_smuggle_in_an_eos(
    tmp_path: Path,
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_tokenizer() / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["sentencepiece_model"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    slow, fast = open_tokenizer(tmp_path), open_tokenizer(tiny_tokenizer())
    assert slow.kind == "huggingface" and fast.kind == "sentencepiece"
    assert (slow.vocab_size, slow.eos_id, slow.pad_id) == (VOCAB_SIZE, 1, 0)
    texts = [*TEXTS, "a </s> b"]
    for ours, theirs in zip(slow.encode(texts, True), fast.encode(texts, True), strict=True):
        assert ours.tolist() == theirs.tolist()
    ids, _ = slow.encode(["a </s> b"], append_eos=True)
    assert ids.tolist().count(1) == 1
    before = slow.fingerprint
    (tmp_path / "special_tokens_map.json").write_text("{}")
    assert open_tokenizer(tmp_path).fingerprint != before


def test_a_tokenizer_without_eos_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(prose(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = open_tokenizer(tmp_path / "m.model")
    assert tokenizer.eos_id is None
    with pytest.raises(UserError, match=r"m\.model: .*no end-of-sequence token.*--no-append_eos"):
        require_eos(tokenizer)


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such tokenizer"):
        open_tokenizer(tmp_path / "nowhere")
    (tmp_path / "a.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"a\.model: not a SentencePiece model"):
        open_tokenizer(tmp_path / "a.model")
    (tmp_path / "b.model").touch()
    with pytest.raises(UserError, match=r"b\.model: .* \(the file is empty\)"):
        open_tokenizer(tmp_path / "b.model")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt: a tokenizer is"):
        open_tokenizer(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: transformers cannot load"):
        open_tokenizer(tmp_path / "empty")


def test_training_reads_a_bounded_sample_of_every_file(tmp_path: Path) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", prose(2000, seed=ord(name)))
    tokenizer, sample = train_tokenizer(
        [str(tmp_path / "*.jsonl")], tmp_path / "out", 400, ReadOptions(), sample_bytes=150_000
    )
    assert tokenizer.vocab_size == 400
    assert sample.files == 3 and sample.text_bytes == 150_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "out"]


def test_training_explains_impossible_vocabularies_and_keeps_existing_folders(
    tmp_path: Path,
) -> None:
    text = str(write_jsonl(tmp_path / "a.jsonl", prose(100)))
    for size, message in [
        (50_000, r"too large for 100 documents .* at most \d+"),
        (261, r"too small for the characters of 100 documents .* at least \d+"),
        (259, "more than 259 are needed"),
    ]:
        with pytest.raises(UserError, match=message):
            train_tokenizer([text], tmp_path / "out", size, ReadOptions())
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        train_tokenizer([text], tmp_path / "out", 400, ReadOptions())


def test_every_unusable_input_is_named_and_no_tokenizer_is_written(tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "a.json.gz", prose(1500)).read_bytes()
    for name in ("b", "d"):
        (tmp_path / f"{name}.json.gz").write_bytes(whole[: len(whole) // 2])
    write_jsonl(tmp_path / "c.jsonl", prose(100))
    inputs = [str(tmp_path / "*.gz"), str(tmp_path / "c.jsonl")]
    pattern = r"^2 of 4 inputs failed: .*b\.json\.gz: .*; .*d\.json\.gz: .*No tokenizer was written"
    with pytest.raises(UserError, match=pattern) as caught:
        train_tokenizer(inputs, tmp_path / "out", 400, ReadOptions())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(write_jsonl(tmp_path / "a.jsonl", prose(1500)))

    def full(path: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    for name in ("write_bytes", "write_text"):  # the model; the files made of it
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, full)
            with pytest.raises(UserError, match="out: no space left on the disk"):
                train_tokenizer([text], tmp_path / "out", 400, ReadOptions())
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    train_tokenizer([text], tmp_path / "out", 400, ReadOptions())
    assert open_tokenizer(tmp_path / "out").vocab_size == 400


def test_long_lines_are_cut_at_spaces_and_between_characters() -> None:
    text = " ".join(["wörd"] * 2000).encode()
    pieces = list(sentences(text))
    assert b"".join(pieces) == text and max(map(len, pieces)) <= 4096
    pieces = list(sentences("é".encode() * 5000 + b"\n\nnext"))
    assert "".join(piece.decode() for piece in pieces).count("é") == 5000
    assert pieces[-1] == b"next"
