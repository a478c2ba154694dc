"""A SentencePiece model written as the files that ``transformers.AutoTokenizer`` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalr.errors import UserError

UNIGRAM = 1  # sentencepiece_model.proto, TrainerSpec.ModelType
MATCHED_TYPES = (1, 4)  # NORMAL and USER_DEFINED; the others never match running text
UNMATCHED = 10_000.0  # below any score: tokenizers has no pieces that cannot match
SPACE = "\u2581"


def write_huggingface_files(model: Path, folder: Path, marker: str) -> None:
    """Write ``tokenizer_config.json`` and, for a unigram model, ``tokenizer.json``.

    The Hugging Face tokenizer makes the ids of the SentencePiece model (but for exact ties of two
    segmentations) followed by EOS. ``marker`` becomes a key of the configuration that names the
    ``.model`` file. Other model types get the configuration only.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    trainer = proto.trainer_spec

    def piece(number: int) -> str | None:
        return proto.pieces[number].piece if 0 <= number < len(proto.pieces) else None

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": piece(trainer.eos_id),
        "unk_token": piece(trainer.unk_id),
        "pad_token": piece(trainer.pad_id) or piece(trainer.eos_id),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        marker: model.name,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=1)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if trainer.model_type == UNIGRAM:
        _fast_tokenizer(proto).save(str(folder / "tokenizer.json"))


def _fast_tokenizer(proto: Any) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
    )

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if not rules.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise UserError("SentencePiece models without leading escaped spaces are not supported")
    lowest = min(piece.score for piece in proto.pieces) - UNMATCHED
    vocabulary = [
        (piece.piece, piece.score if piece.type in MATCHED_TYPES else lowest)
        for piece in proto.pieces
    ]
    tokenizer = Tokenizer(
        models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    control = [p.piece for p in proto.pieces if p.type in (2, 3)]  # UNKNOWN, CONTROL
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    if trainer.eos_id >= 0:
        end = proto.pieces[trainer.eos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, trainer.eos_id)]
        )
    return tokenizer
