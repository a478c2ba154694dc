"""A SentencePiece model written as the files that ``transformers.AutoTokenizer`` loads.

A text becomes the ids that SentencePiece gives it, without EOS or BOS: documents end in EOS because
preprocessing appends it, a prompt must not. ``tokenizer.json`` is written only if it was tried and
gives SentencePiece's ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megalr.errors import UserError
from megalr.preprocessing.compare_tokenizers import PROBES, piece_difference, shortened

UNIGRAM, BPE = 1, 2  # sentencepiece_model.proto, TrainerSpec.ModelType
KINDS = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type
UNMATCHED = 10_000.0  # below any score: tokenizers has no pieces that cannot match
SPACE = "\u2581"
PLACEHOLDERS = 0xF0000  # private characters that stand for user-defined pieces while normalizing
UNLIMITED = 1_000_000_000  # model_max_length of a tokenizer that belongs to no model
RANDOM_LINES = 200


class Inconvertible(Exception):
    """Why a SentencePiece model has no equal in the tokenizers library."""


def write_huggingface_files(model: Path, folder: Path, marker: str) -> None:
    """Write ``tokenizer_config.json`` and, if the model can be converted, ``tokenizer.json``.

    ``marker`` becomes a key of the configuration that names the ``.model`` file.
    """
    proto = read_model(model)
    trainer = proto.trainer_spec

    def piece(number: int) -> str | None:
        return proto.pieces[number].piece if 0 <= number < len(proto.pieces) else None

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": piece(trainer.eos_id),
        "unk_token": piece(trainer.unk_id),
        "pad_token": piece(trainer.pad_id) or piece(trainer.eos_id),
        "clean_up_tokenization_spaces": False,
        "model_max_length": UNLIMITED,
        marker: model.name,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=1)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    try:
        content = _converted(model, proto).to_str(pretty=True)
    except Inconvertible:
        return  # conversion_problem says why, where the file is needed
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")


def conversion_problem(model: Path) -> str | None:
    """Why no ``tokenizer.json`` can be made of a SentencePiece model; None if it can."""
    try:
        _converted(model, read_model(model))
    except Inconvertible as error:
        return str(error)
    return None


def read_model(model: Path) -> Any:
    """The ``ModelProto`` of a SentencePiece model; UserError if it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model.read_bytes())
    except DecodeError as error:
        raise UserError(f"{model}: not a SentencePiece model ({error})") from None
    return proto


def _converted(model: Path, proto: Any) -> Any:
    """The ``tokenizers.Tokenizer``; raises Inconvertible."""
    import sentencepiece

    try:
        tokenizer = _fast_tokenizer(proto)
        _check_equal(
            sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes()), proto, tokenizer
        )
    except Inconvertible:
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        text = (str(error).strip().splitlines() or [repr(error)])[0]
        raise Inconvertible(f"tokenizers cannot hold it ({text[:200]})") from None
    return tokenizer


def is_library_error(error: BaseException) -> bool:
    """Whether an error is an exception, or a panic of the tokenizers library, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _fast_tokenizer(proto: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        kind = KINDS.get(trainer.model_type, str(trainer.model_type))
        raise Inconvertible(
            f"it is a SentencePiece model of type {kind}, and tokenizers has unigram and bpe only"
        )
    if not rules.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise Inconvertible("it does not mark the start of words by a leading escaped space")
    user_defined = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    user_defined.sort(key=len, reverse=True)  # SentencePiece takes the longest match
    if trainer.model_type == UNIGRAM:
        tokenizer = Tokenizer(_unigram(proto))
    else:
        tokenizer = Tokenizer(_bpe(proto, ignore_merges=any(len(u) > 1 for u in user_defined)))
        if user_defined:
            pattern = Regex("|".join(re.escape(piece) for piece in user_defined))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.normalizer = _normalizer(rules, user_defined)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    special = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    best = max((p.score for p in proto.pieces if p.type == NORMAL), default=0.0)
    lowest = min(piece.score for piece in proto.pieces) - UNMATCHED

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:  # SentencePiece's rule: better than any split of it
            return len(piece.piece.encode()) * best - 0.1
        return piece.score if piece.type == NORMAL else lowest

    vocabulary = [(piece.piece, score(piece)) for piece in proto.pieces]
    trainer = proto.trainer_spec
    return models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)


def _bpe(proto: Any, ignore_merges: bool) -> Any:
    """SentencePiece merges any two neighbours whose union is a piece, best score first."""
    from tokenizers import models

    if any(p.type == UNUSED for p in proto.pieces):
        raise Inconvertible("it is a bpe model with pieces of type UNUSED")
    vocabulary = {p.piece: number for number, p in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    merges = [
        (-score, piece[:split], piece[split:])
        for piece, score in normal.items()
        for split in range(1, len(piece))
        if piece[:split] in normal and piece[split:] in normal
    ]
    merges.sort(key=lambda merge: merge[0])  # stable: splits of one piece keep their order
    trainer = proto.trainer_spec
    return models.BPE(
        vocabulary,
        [(left, right) for _, left, right in merges],
        unk_token=proto.pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=ignore_merges,
    )


def _normalizer(rules: Any, user_defined: list[str]) -> Any:
    """SentencePiece's normalization, which leaves user-defined pieces as they are."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        by_character = normalizers.Precompiled(rules.precompiled_charsmap)
        # tokenizers looks up the grapheme "\r\n" as one, SentencePiece its characters.
        line_end = "".join(map(by_character.normalize_str, "\r\n"))
        steps += [normalizers.Replace("\r\n", line_end)] if line_end != "\r\n" else []
        steps.append(by_character)
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    trial = normalizers.Sequence(steps)
    hidden = [piece for piece in user_defined if trial.normalize_str(f"a{piece}b") != f"a{piece}b"]
    private = {piece: chr(PLACEHOLDERS + number) for number, piece in enumerate(hidden)}
    before = [normalizers.Replace(piece, mark) for piece, mark in private.items()]
    after = [normalizers.Replace(mark, piece) for piece, mark in private.items()]
    if rules.remove_extra_whitespaces:  # Strip removes more than spaces
        strip = [normalizers.Replace(Regex(r"\A +| +\z"), ""), steps[-1]]
        steps = [*steps[:-2], *strip]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence([*before, *steps, *after])


def _check_equal(model: Any, proto: Any, tokenizer: Any) -> None:
    """Raise Inconvertible unless both give the same ids on PROBES, user-defined and random text."""
    own = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    different = piece_difference(own, tokenizer.get_vocab())
    if different is not None or tokenizer.get_vocab_size() != len(proto.pieces):
        raise Inconvertible(f"its vocabulary is another after conversion ({different})")
    lines = [*PROBES, *_user_defined_lines(proto), *_random_lines(model, proto)]
    tokenizer.encode_special_tokens = True  # as SentencePiece, which never parses them
    for line in lines:
        expected = model.encode(line)
        found = tokenizer.encode(line, add_special_tokens=False).ids
        if found != expected and not is_tie(proto, expected, found):
            raise Inconvertible(
                f"converted, {line[:60]!r} becomes {shortened(found)} instead of "
                f"{shortened(expected)}"
            )
    tokenizer.encode_special_tokens = False


def is_tie(proto: Any, expected: list[int], found: list[int]) -> bool:
    """Whether two segmentations of one text have the same score under a unigram model.

    Either is right then: four spaces are three and one or one and three. SentencePiece adds the
    scores in float32 and tokenizers in float64, so the rounding decides, and not always alike.
    """
    if proto.trainer_spec.model_type != UNIGRAM:
        return False
    if max([*expected, *found], default=0) >= len(proto.pieces):  # a token added to it
        return False
    first, second = ([proto.pieces[n] for n in ids] for ids in (expected, found))
    if "".join(p.piece for p in first) != "".join(p.piece for p in second):
        return False
    others = [[p.piece for p in row if p.type != NORMAL] for row in (first, second)]
    if others[0] != others[1]:  # bytes, unknowns, user-defined pieces
        return False
    here, there = (sum(p.score for p in row if p.type == NORMAL) for row in (first, second))
    return abs(here - there) <= 1e-4 * max(1.0, abs(here))


def _user_defined_lines(proto: Any) -> list[str]:
    pieces = [p.piece for p in proto.pieces if p.type == USER_DEFINED][:200]
    return [
        line
        for p in pieces
        for line in (p, f"a{p}b", f"{p}{p} {p}", f" {p} x", f"The cat{p}", f"{p}sat")
    ]


def _random_lines(model: Any, proto: Any) -> list[str]:
    """Text of random pieces, so that all parts of the vocabulary are tried."""
    ids = [number for number, p in enumerate(proto.pieces) if p.type == NORMAL]
    if not ids:
        return []
    chosen = np.random.default_rng(0).choice(ids, (RANDOM_LINES, 8))
    return [model.decode(row) for row in chosen.tolist()]
