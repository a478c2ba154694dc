"""Training a SentencePiece tokenizer on a bounded sample of the input."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.errors import UserError
from megalr.files import disk_errors
from megalr.preprocessing.tokenizer import (
    SENTENCEPIECE_NAME,
    SentencePieceTokenizer,
    open_tokenizer,
)
from megalr.readers.documents import DocumentReader, ReadOptions
from megalr.readers.input_splits import InputSplit, failed_inputs, holds_tokens, plan_splits

LONGEST_SENTENCE = 4096  # bytes; SentencePiece skips longer ones, so they are split
THREADS = 16
"""On every machine, since the rounding of sums over threads decides the order of some pieces."""
SMALLEST_VOCABULARY = 3 + 256  # pad, eos, unk and the 256 bytes


@dataclass(frozen=True)
class SampledText:
    """Amount of text used for training."""

    files: int
    documents: int
    text_bytes: int


def train_tokenizer(
    inputs: Sequence[str],
    output: Path,
    vocab_size: int,
    reading: ReadOptions,
    sample_bytes: int = 100_000_000,
    threads: int = THREADS,
) -> tuple[SentencePieceTokenizer, SampledText]:
    """Train a unigram model with byte fallback and write it as a tokenizer folder.

    Ids: pad 0, eos 1, unk 2, no bos, then 256 bytes, then pieces. Text is not normalised and no
    white space is dropped: decoding the ids of a text gives the text back, byte for byte. At most
    ``sample_bytes`` of text are read, the same share from the head of every input file, which
    bounds time and memory (about 20 bytes of memory per byte of text). The ids depend on
    ``threads``, not on the number of cores.

    A tokenizer is made of all inputs: where some cannot be read, the others are read all the same,
    so that one error names every unusable input, and nothing is written.

    Raises:
        UserError: unusable inputs, an occupied output folder, a disk that cannot be written (the
            folder does not appear then), a vocabulary size that is too small for the characters or
            too large for the text.
    """
    import sentencepiece

    if vocab_size <= SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab_size is {vocab_size}; more than {SMALLEST_VOCABULARY} are needed for the 256 "
            f"bytes and 3 special ids"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another --output or delete it")
    splits = plan_splits(inputs, split_bytes=1 << 60)
    for split in splits.values():
        if holds_tokens(split):
            raise UserError(f"{split.file}: holds tokens; a tokenizer is trained on text")
    sample = _Sample(list(splits.values()), reading, sample_bytes)
    temporary = output.with_name(f".{output.name}.partial")
    model = io.BytesIO()  # sentencepiece would not notice a full disk
    with disk_errors(output):
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "tokenizer").mkdir(parents=True)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="unigram",
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=LONGEST_SENTENCE + 16,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                seed_sentencepiece_size=min(1_000_000, max(100_000, 20 * vocab_size)),
                num_threads=threads,
                minloglevel=2,
            )
            _check_inputs(sample, len(splits))
            (temporary / SENTENCEPIECE_NAME).write_bytes(model.getvalue())
            SentencePieceTokenizer(temporary / SENTENCEPIECE_NAME).copy_to(temporary / "tokenizer")
            os.replace(temporary / "tokenizer", output)  # also over an empty folder
        except RuntimeError as error:
            _check_inputs(sample, len(splits))
            raise UserError(_explained(str(error), vocab_size, sample)) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = open_tokenizer(output)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer, SampledText(len(splits), sample.documents, sample.text_bytes)


def _check_inputs(sample: _Sample, inputs: int) -> None:
    if sample.failures:
        raise UserError(
            f"{failed_inputs(sample.failures, inputs)}. No tokenizer was written; repair these or "
            "take them out of --input, and start again"
        )


class _Sample:
    """Iterates over sentences from the head of every input.

    Attributes:
        failures: one line for every input that could not be read.
    """

    def __init__(self, splits: list[InputSplit], reading: ReadOptions, sample_bytes: int) -> None:
        self._splits, self._reading = splits, reading
        self._share = max(1, sample_bytes // len(splits))
        self.documents = self.text_bytes = 0
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[bytes]:
        for split in self._splits:
            try:
                yield from self._head(split)
            except UserError as error:
                self.failures.append(str(error))

    def _head(self, split: InputSplit) -> Iterator[bytes]:
        left = self._share
        for texts in DocumentReader(split, self._reading):
            for text in texts:
                encoded = text.encode()
                yield from sentences(encoded[:left])
                self.documents += 1
                self.text_bytes += min(left, len(encoded))
                left -= len(encoded)
                if left <= 0:
                    return


def sentences(text: bytes) -> Iterator[bytes]:
    """The lines of a text; long ones are split at spaces into at most 4096 bytes each."""
    for line in text.splitlines():
        while len(line) > LONGEST_SENTENCE:
            end = line.rfind(b" ", 1, LONGEST_SENTENCE)
            end = LONGEST_SENTENCE if end < 0 else end
            yield _complete_characters(line[:end])
            line = line[end:]
        if line.strip():
            yield _complete_characters(line)


def _complete_characters(text: bytes) -> bytes:
    """The text without partial characters at either end."""
    return text.decode("utf-8", errors="ignore").encode()


def _explained(message: str, vocab_size: int, sample: _Sample) -> str:
    seen = f"{sample.documents} documents with {sample.text_bytes} bytes of text"
    if too_high := re.search(r"Vocabulary size too high.*?<= (\d+)", message):
        return (
            f"--vocab_size {vocab_size} is too large for {seen}; give more text or at most "
            f"{too_high[1]}"
        )
    if too_low := re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message):
        return (
            f"--vocab_size {vocab_size} is too small for the characters of {seen}; give at least "
            f"{int(too_low[2]) + 1}"
        )
    if not sample.documents:
        return "the inputs hold no document to train a tokenizer on; check --input and --text_key"
    return f"SentencePiece cannot train on {seen}: {message.strip().splitlines()[-1]}"
