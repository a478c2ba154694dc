"""Writing a decoder as a folder that ``transformers.AutoModelForCausalLM`` loads."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megalr.errors import UserError
from megalr.hf.factorized import auto_map, factorization, factorized_tensors
from megalr.hf.families import families_of, transformers_config
from megalr.hf.modeling_factorized import FACTORIZED, TRANSFORMERS
from megalr.hf.names import dense_tensors
from megalr.hf.write_tokenizer import exported_difference, write_tokenizer
from megalr.models.decoder import Decoder
from megalr.preprocessing.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOLDER_FORMS = ("dense", "factorized")
SIZE = re.compile(r"\d+(\.\d+)?[KMGT]B")


EVALUATION = "megalr_evaluation"
"""Key of config.json that transformers carries along and does not read."""


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        dtype: name in ``DTYPES``, to which every tensor is rounded once.
        max_shard_size: largest weight file, a number with a unit ("5GB").
        max_positions: longest trained sequence (tokens).
        evaluation: how the run evaluated after its last update, ``packing``, ``document_mask`` and
            largest number of targets, ``tokens`` (None: all); recorded in config.json under
            :data:`EVALUATION`, so that the folder is evaluated on the same targets by default.
            None: not recorded.
        form: one of FOLDER_FORMS. ``dense``: factors are multiplied out in float32.
            ``factorized``: the factors as trained, with the scale in B.

    Raises:
        UserError: a malformed size.
    """

    dtype: str
    max_shard_size: str
    max_positions: int
    evaluation: dict[str, Any] | None = None
    form: str = "dense"

    def __post_init__(self) -> None:
        if not SIZE.fullmatch(self.max_shard_size):
            raise UserError(
                f"--max_shard_size {self.max_shard_size!r}: give a number with KB, MB, GB or TB, "
                "for example 5GB"
            )


def check_output(output: Path) -> None:
    """Raise UserError unless ``output`` is new or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UserError(f"--output {output} is not an empty folder: choose a new one, or empty it")


def write_model(
    decoder: Decoder,
    output: Path,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    card: str,
) -> None:
    """Write weights, configurations, tokenizer and ``card`` (README.md) atomically.

    Everything is written to a temporary folder beside ``output``, which is renamed at the end.

    Args:
        decoder: not sharded by tensor parallelism, on the CPU, with the master weights.
        output: new or empty folder.
        options: see ExportOptions.
        tokenizer: copied into the folder, its special ids recorded in config.json; or None.
        card: Markdown.

    Raises:
        UserError: ``output`` is not empty, no transformers architecture computes this decoder,
            weights are not finite (in ``options.dtype``), the vocabulary is smaller than the
            tokenizer's, transformers cannot hold the tokenizer or
            would load another one, or the disk cannot be written.
    """
    if tokenizer is not None and tokenizer.vocab_size > decoder.config.vocab_size:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{decoder.config.vocab_size}: give the tokenizer that the data was made with"
        )
    with new_folder(output) as temporary:
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary, options.max_positions)
        family = _choose_family(decoder, options, tokenizer, temporary)
        model = transformers_model(decoder, family, options, tokenizer)
        model.save_pretrained(temporary, max_shard_size=options.max_shard_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, renamed to it at the end, removed after an error.

    Raises:
        UserError: ``output`` is not empty, or the disk cannot be written.
    """
    check_output(output)
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield temporary
        _publish(temporary, output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"{output}: cannot be written ({reason}); nothing was left there: free space or "
            "choose another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _choose_family(
    decoder: Decoder, options: ExportOptions, tokenizer: Tokenizer | None, folder: Path
) -> str:
    """The first architecture with which transformers loads the tokenizer in ``folder`` unchanged.

    For some architectures AutoTokenizer replaces the class that the tokenizer's files name by its
    own, which yields other ids without an error.
    """
    families = families_of(decoder.config)
    if tokenizer is None:
        return families[0]
    for family in families:
        _config(decoder, family, options, tokenizer).save_pretrained(folder)
        difference = exported_difference(tokenizer, folder)
        if difference is None:
            return family
    raise UserError(
        f"{tokenizer.path}: transformers would load another tokenizer from a {families[0]} folder "
        f"({difference}); give the tokenizer's Hugging Face folder with --tokenizer, or "
        "--tokenizer none"
    )


def _config(
    decoder: Decoder, family: str, options: ExportOptions, tokenizer: Tokenizer | None
) -> Any:
    config = transformers_config(
        decoder.config,
        family,
        options.max_positions,
        tokenizer.eos_id if tokenizer is not None else None,
        tokenizer.pad_id if tokenizer is not None else None,
        options.form == "factorized",
    )
    if options.form == "factorized":
        config.factorization = factorization(decoder, family)
        config.auto_map = auto_map(family)
    if options.evaluation is not None:
        setattr(config, EVALUATION, options.evaluation)
    return config


def transformers_model(
    decoder: Decoder, family: str, options: ExportOptions, tokenizer: Tokenizer | None
) -> Any:
    """The transformers model with the decoder's weights in ``options.form`` and ``options.dtype``.

    Raises:
        UserError: as in :func:`write_model`.
    """
    config = _config(decoder, family, options, tokenizer)
    if options.form == "factorized":
        causal: Any = FACTORIZED[family][2]
        tensors = factorized_tensors(decoder, family, config.factorization)
    else:
        causal = TRANSFORMERS[family][2]
        tensors = dense_tensors(decoder, family)
    with torch.device("meta"):
        model = causal._from_config(config)
    dtype = DTYPES[options.dtype]
    state = {}
    for name, tensor in tensors:
        stored_as = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.to(stored_as, copy=True).contiguous()
        if not bool(state[name].isfinite().all()):
            finite = bool(tensor.isfinite().all())
            reason = f"too large for {options.dtype}" if finite else "not finite: the run diverged"
            raise UserError(
                f"{name}: its weights are {reason}; "
                + ("use --dtype bfloat16" if finite else "export an earlier checkpoint with --tag")
            )
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if decoder.config.tie_embeddings else set()
    if set(missing) - tied or unexpected:
        raise RuntimeError(
            f"transformers' {config.model_type} has other tensors: missing {missing}, "
            f"unexpected {unexpected}"
        )
    model.tie_weights()
    return model


def _publish(temporary: Path, output: Path) -> None:
    """Flush all files to the disk, then rename the folder."""
    os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes it private
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(temporary, output)  # also over an empty folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
