"""A tokenizer in an exported folder: the ids of training, nothing added to a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.files import read_json_object
from megalr.hf.pretrained_config import first_line
from megalr.preprocessing.compare_tokenizers import (
    PROBES,
    encoded_lines,
    piece_difference,
    shortened,
)
from megalr.preprocessing.hf_tokenizer import conversion_problem
from megalr.preprocessing.tokenizer import CONFIG_NAME, Tokenizer

FAST_NAME = "tokenizer.json"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Copy the tokenizer's files; prompts are limited to ``max_positions`` and get no EOS or BOS.

    Training's documents end in EOS because preprocessing appends it. A tokenizer that appends it
    to a prompt as well would make the model start another document.

    Raises:
        UserError: a SentencePiece model that transformers cannot hold.
    """
    if tokenizer.kind == "sentencepiece":
        problem = conversion_problem(tokenizer.path)
        if problem is not None:
            raise UserError(
                f"{tokenizer.path}: no {FAST_NAME} can be made of it: {problem}; give a Hugging "
                "Face folder with the same ids with --tokenizer, or --tokenizer none"
            )
    tokenizer.copy_to(folder)
    path = folder / CONFIG_NAME
    config = read_json_object(path) if path.exists() else {}
    if not config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = max_positions
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key):
            config[key] = False
    _write(path, config)
    fast = folder / FAST_NAME
    if fast.exists():
        content = read_json_object(fast)
        if content.get("post_processor") is not None:
            content["post_processor"] = None
            _write(fast, content)


def exported_difference(tokenizer: Tokenizer, folder: Path) -> str | None:
    """How the tokenizer that transformers loads from ``folder`` differs; None if it agrees.

    Ties between segmentations are no difference (``Comparable.is_tie``).
    """
    from transformers import AutoTokenizer

    import megalr.hf.auto  # noqa: F401  (AutoTokenizer warns of types that it does not know)

    lines = list(PROBES)
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        pieces = loaded.get_vocab()
        bare = [loaded(line, add_special_tokens=False)["input_ids"] for line in lines]
        prompts = [loaded(line)["input_ids"] for line in lines]
    except Exception as error:  # transformers raises nearly anything for what it cannot load
        return first_line(error)
    different = piece_difference(tokenizer.piece_ids(), pieces)
    if different is not None:
        return different
    for line, there, here, prompt in zip(
        lines, encoded_lines(tokenizer, lines), bare, prompts, strict=True
    ):
        if here != there and not tokenizer.is_tie(there, here):
            return f"{line!r} becomes {shortened(here)} instead of {shortened(there)}"
        if prompt != here:
            return f"the prompt {line!r} becomes {shortened(prompt)} instead of {shortened(here)}"
    return None


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
