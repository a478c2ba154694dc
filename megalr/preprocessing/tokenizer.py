"""Tokenizers: text to ids and back, and the files that define one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalr.data.manifest import TokenizerInfo
from megalr.errors import UserError
from megalr.files import read_json_object
from megalr.preprocessing.hf_tokenizer import (
    is_library_error,
    is_tie,
    read_model,
    write_huggingface_files,
)

Ids = NDArray[np.int32]
SENTENCEPIECE_NAME = "spiece.model"
CONFIG_NAME = "tokenizer_config.json"
MARKER = "sentencepiece_model"  # key of tokenizer_config.json that names the .model file
HUGGINGFACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tekken.json",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
)
"""Files that decide the ids, beside ``model_type`` of a model's config.json."""
FORMER_FILES = ("*.json", "*.model", "merges.txt", "vocab.txt", "*.tiktoken")
"""Files that fingerprints covered up to version 1; of a tokenizer's own folder the same ones."""
MODEL_CONFIG = "config.json"


class Tokenizer(Protocol):
    """Ids are below ``vocab_size``; ``eos_id`` is None if the vocabulary has no EOS."""

    kind: str
    path: Path
    vocab_size: int
    eos_id: int | None
    pad_id: int
    fingerprint: str

    def encode(self, texts: list[str], append_eos: bool) -> tuple[Ids, Ids]:
        """Concatenated ids of all texts and the number of ids of each text; both int32."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        ...

    def piece_ids(self) -> dict[str, int]:
        """Every piece of the vocabulary with its id."""
        ...

    def is_tie(self, ids: list[int], others: list[int]) -> bool:
        """Whether both are segmentations of one text that the model scores alike."""
        ...

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether a recorded fingerprint is this tokenizer's."""
        ...

    def copy_to(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder`` so that open_tokenizer can read them."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model; the fingerprint is the SHA-256 of the ``.model`` file."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from None
        if not content:  # sentencepiece takes it, as a model without pieces
            raise UserError(f"{path}: not a SentencePiece model (the file is empty)")
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._model.get_piece_size()
        try:
            self.piece_ids()
        except UnicodeDecodeError:
            raise UserError(
                f"{path}: not a SentencePiece model (pieces that are no text)"
            ) from None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id or 0

    def encode(self, texts: list[str], append_eos: bool) -> tuple[Ids, Ids]:
        encode = self._model.encode
        rows = [encode(text, add_eos=append_eos, return_type="numpy") for text in texts]
        return _joined(rows)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece_ids(self) -> dict[str, int]:
        return {self._model.id_to_piece(number): number for number in range(self.vocab_size)}

    def is_tie(self, ids: list[int], others: list[int]) -> bool:
        return is_tie(read_model(self.path), ids, others)

    def has_fingerprint(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / SENTENCEPIECE_NAME)
        write_huggingface_files(folder / SENTENCEPIECE_NAME, folder, MARKER)


class HuggingFaceTokenizer:
    """A folder that ``transformers.AutoTokenizer`` loads.

    Special tokens that a document spells out are encoded as ordinary text (where the tokenizer has
    a fast implementation and its model does not list them as pieces). Code in the folder is never
    run. The fingerprint is the SHA-256 of names and contents of the files that decide the ids, and
    of the model's type if the folder is a model's.
    """

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one core
        from transformers import AutoTokenizer

        self.path = path
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
            self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        except BaseException as error:  # transformers raises nearly anything for a bad folder
            if not is_library_error(error):
                raise
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
            if "trust_remote_code" in str(error):
                reason = "it needs the folder's own code, which is not run"
            raise UserError(f"{path}: transformers cannot load a tokenizer ({reason})") from None
        self._model_type = _model_type(path)
        self.fingerprint = _hash_files(path, HUGGINGFACE_FILES, self._model_type)
        self.eos_id = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else self.eos_id or 0
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def encode(self, texts: list[str], append_eos: bool) -> tuple[Ids, Ids]:
        try:
            if self._backend is not None:
                encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
                rows = [encoding.ids for encoding in encodings]
            else:
                rows = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        except BaseException as error:
            if not is_library_error(error):
                raise
            reason = str(error).splitlines()[0][:300]
            raise UserError(
                f"{self.path}: the tokenizer cannot encode a text ({reason})"
            ) from error
        tail = [self.eos_id] if append_eos else []
        return _joined([np.array(row + tail, np.int32) for row in rows])

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def piece_ids(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def is_tie(self, ids: list[int], others: list[int]) -> bool:
        return False  # what transformers loads adds scores as any other of its tokenizers does

    def has_fingerprint(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint or fingerprint == _hash_files(
            self.path, FORMER_FILES
        )

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in _files(self.path, HUGGINGFACE_FILES):
            shutil.copyfile(file, folder / file.name)
        if self._model_type is not None:  # transformers may choose the class by it
            content = json.dumps({"model_type": self._model_type})
            (folder / MODEL_CONFIG).write_text(content + "\n", encoding="utf-8")


def _joined(rows: list[Ids]) -> tuple[Ids, Ids]:
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return (np.concatenate(rows) if rows else np.empty(0, np.int32)), lengths


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _hash_files(folder: Path, patterns: tuple[str, ...], model_type: str | None = None) -> str:
    digest = hashlib.sha256()
    for file in _files(folder, patterns):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    if model_type is not None:
        digest.update(f"model_type\0{model_type}".encode())
    return digest.hexdigest()


def _model_type(folder: Path) -> str | None:
    """The architecture of the model in a folder; None if there is no model."""
    path = folder / MODEL_CONFIG
    kind = read_json_object(path).get("model_type") if path.is_file() else None
    return kind if isinstance(kind, str) else None


def holds_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer, in whatever form."""
    return bool(_files(folder, HUGGINGFACE_FILES))


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a ``*.model`` file, a folder of ``megalr tokenizer`` or a Hugging Face folder.

    A folder with nothing but one ``*.model`` file is that SentencePiece model.

    Raises:
        UserError: no such path, or files that are no tokenizer's.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such tokenizer; give a SentencePiece *.model file or the folder of a "
            f"Hugging Face tokenizer"
        )
    if path.is_file():
        if path.suffix != ".model":
            raise UserError(f"{path}: a tokenizer is a *.model file or a folder")
        return SentencePieceTokenizer(path)
    config = path / CONFIG_NAME
    name = read_json_object(config).get(MARKER) if config.exists() else None
    if name is not None:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{config}: {MARKER} is {name!r}, which is no file of the folder")
        if not (path / name).is_file():
            raise UserError(f"{path / name}: no such file, but {config.name} names it")
        return SentencePieceTokenizer(path / name)
    files = _files(path, (*HUGGINGFACE_FILES, MODEL_CONFIG))
    if len(files) == 1 and files[0].suffix == ".model":
        return SentencePieceTokenizer(files[0])
    return HuggingFaceTokenizer(path)


def require_eos(tokenizer: Tokenizer) -> None:
    """UserError if documents are to end in EOS and the tokenizer has none."""
    if tokenizer.eos_id is None:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has no end-of-sequence token to append to documents; "
            f"use another tokenizer, or pass --no-append_eos to write documents without an end"
        )


def tokenizer_info(tokenizer: Tokenizer, path: str) -> TokenizerInfo:
    """The manifest's record of a tokenizer whose copy lies at ``path`` in the data folder."""
    return TokenizerInfo(
        path=path,
        kind=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
