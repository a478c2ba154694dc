"""Evaluation of a checkpoint or of a transformers folder on any data set, outside a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megalr.checkpoint import open_checkpoint
from megalr.config.schema import RunConfig
from megalr.data import (
    EvaluationBatches,
    TokenDataset,
    check_vocabulary,
    open_training_data,
    open_validation_data,
)
from megalr.data.build import validation_folders
from megalr.data.manifest import load_manifest
from megalr.distributed.agreement import raise_on_any_rank, run_on_all, run_on_rank0
from megalr.errors import UserError
from megalr.evaluation.perplexity import evaluate
from megalr.files import read_json_object
from megalr.hf.init_from_pretrained import check_same_tokenizers
from megalr.hf.pretrained_config import (
    FACTORIZED_PREFIX,
    IMPORTED,
    check_field_types,
    first_line,
    load_config,
)
from megalr.hf.trained_run import load_decoder, open_verified, run_config
from megalr.hf.write import DTYPES, EVALUATION
from megalr.kernels.document_mask import document_bounds, visible
from megalr.kernels.loss import IGNORE
from megalr.preprocessing.compare_tokenizers import tokenizer_difference
from megalr.preprocessing.tokenizer import holds_tokenizer, open_tokenizer

LONGEST = 2048
"""Sequence length for a model whose configuration does not limit it to less (tokens)."""
LOGITS_PER_CHUNK = 2**26
"""Logits converted to float32 at a time."""


PUBLISHED = (
    "perplexity_published depends on the batch shape (micro_batch_size, sequence_length, ranks): "
    "it is for comparison with printed numbers, not between runs"
)


@dataclass(frozen=True)
class Request:
    """Options of an evaluation; None takes the run's or the model's value.

    Attributes:
        data: preprocessed folders; empty: the validation data of the run.
        split: ``validation`` (all shards of a folder without that split) or ``train``.
        sequence_length: positions of a sample (tokens).
        packing: whether samples are windows of the token stream rather than documents.
        document_mask: whether attention stays within the documents of a window; never without
            packing.
        tokens: largest number of targets; 0: all.
        micro_batch_size: sequences per forward pass and rank.
        dtype: compute dtype, a key of ``megalr.hf.write.DTYPES``.
    """

    data: tuple[str, ...] = ()
    split: str = "validation"
    sequence_length: int | None = None
    packing: bool | None = None
    document_mask: bool | None = None
    tokens: int | None = None
    micro_batch_size: int | None = None
    dtype: str | None = None


def evaluate_run(
    run: Path, tag: str | None, request: Request, device: torch.device
) -> dict[str, Any]:
    """Perplexity of a checkpoint. Collective.

    An empty request repeats the run's own evaluation after that update: same data, batches and
    precision.

    Returns:
        Plain values: the fields of an Evaluation, and how it was measured.

    Raises:
        UserError: a checkpoint or data that cannot be read, or that do not match.
    """
    tag = run_on_rank0(lambda: open_verified(run, tag).folder.name)
    checkpoint = run_on_all(lambda: open_checkpoint(run, tag))
    config = run_on_all(lambda: run_config(checkpoint))
    data = run_on_all(lambda: _data_of_run(config, request))
    notes = run_on_all(lambda: _check_tokenizer_of_run(config, data))
    dtype = request.dtype or ("float32" if config.train.precision == "fp32" else "bfloat16")
    decoder = run_on_all(lambda: load_decoder(run, checkpoint)).to(device, DTYPES[dtype])
    limit = config.evaluation.limit(last=checkpoint.update >= config.train.updates)
    if request.tokens is not None:
        limit = request.tokens or None
    micro = (
        request.micro_batch_size
        or config.evaluation.micro_batch_size
        or config.train.micro_batch_size
    )
    facts = {
        "model": str(run),
        "checkpoint": checkpoint.folder.name,
        "update": checkpoint.update,
        "training_tokens": checkpoint.tokens,
        "method": config.method.name,
    }
    return facts | _measure(decoder, data, micro, limit, dtype, notes, device)


def evaluate_model(folder: Path, request: Request, device: torch.device) -> dict[str, Any]:
    """Perplexity of a model in a transformers folder, computed by transformers. Collective.

    ``sequence_length`` defaults to the model's longest, at most LONGEST. A folder that megalr
    exported is evaluated on the targets of its run's last evaluation by default, on the same data;
    any other on all targets of packed samples.

    Returns:
        Plain values, as :func:`evaluate_run`.

    Raises:
        UserError: a model or data that cannot be read, or that do not match.
    """
    if not request.data:
        raise UserError("--model needs --data FOLDER: a model does not know its validation data")
    model = run_on_all(lambda: open_transformers(folder))
    if request.dtype is not None:
        model = model.to(DTYPES[request.dtype])
    meant = getattr(model.config, "max_position_embeddings", None) or LONGEST
    length = request.sequence_length or min(meant, LONGEST)
    if length > meant:
        raise UserError(f"--sequence_length {length}: the model in {folder} is meant for {meant}")
    recorded = run_on_all(lambda: _recorded_evaluation(folder, model.config))
    tokens = recorded["tokens"] if request.tokens is None else request.tokens
    samples = _samples(request, length, recorded["packing"], recorded["document_mask"])
    run_on_all(lambda: _check_masks(model.config, samples))
    data = run_on_all(lambda: _open(request.data, request.split, samples))
    run_on_all(lambda: check_vocabulary(data, model.config.vocab_size))
    notes = run_on_all(lambda: _check_tokenizer_of_model(folder, data))
    dtype = str(model.dtype).removeprefix("torch.")
    wrapped = SummedLoss(model).to(device)
    facts = {"model": str(folder), "architecture": type(model).__name__}
    micro = request.micro_batch_size or 8
    return facts | _measure(wrapped, data, micro, tokens or None, dtype, notes, device)


def _recorded_evaluation(folder: Path, config: Any) -> dict[str, Any]:
    """``packing``, ``document_mask`` and ``tokens`` (None: all) that an export recorded.

    The defaults without a record; exports of older versions have no ``document_mask``.
    """
    recorded = getattr(config, EVALUATION, None)
    if recorded is None:
        return {"packing": True, "document_mask": False, "tokens": None}
    values = recorded if isinstance(recorded, dict) else {}
    flags = [values.get("packing"), values.get("document_mask", False)]
    tokens = values.get("tokens", 0)
    if any(type(flag) is not bool for flag in flags) or not (
        tokens is None or (type(tokens) is int and tokens > 0)
    ):
        raise UserError(
            f"{folder}: config.json has {EVALUATION} {recorded!r:.80}: must hold packing (true or "
            "false) and tokens (a positive number or null); export the run again, or remove the key"
        )
    return {"packing": flags[0], "document_mask": flags[1], "tokens": tokens}


def _samples(request: Request, length: int, packing: bool, document_mask: bool) -> dict[str, Any]:
    """How samples are cut, from the request or, where it does not say, from the other arguments."""
    packing = packing if request.packing is None else request.packing
    wanted = document_mask and packing
    return {
        "sequence_length": length,
        "packing": packing,
        "document_mask": wanted if request.document_mask is None else request.document_mask,
    }


def _check_masks(config: Any, samples: dict[str, Any]) -> None:
    """UserError if transformers cannot combine a document mask with the model's own."""
    window = getattr(config, "sliding_window", None)
    if samples["document_mask"] and window is not None and window < samples["sequence_length"]:
        raise UserError(
            f"--document_mask true: the model has sliding_window {window}, which transformers "
            f"drops when it is given a mask; give --sequence_length {window} or less, or evaluate "
            "the run"
        )


class SummedLoss(nn.Module):
    """A transformers causal language model behind the interface of Decoder's loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of -log p(label) over all targets, float32; arguments as the Decoder takes them."""
        masks: dict[str, torch.Tensor] = {}
        if positions is not None:
            sees = visible(document_bounds(positions))  # (B, 1, S, S)
            hidden = torch.finfo(self.model.dtype).min
            mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=sees.device)
            masks = {"position_ids": positions.long(), "attention_mask": mask}
            mask.masked_fill_(~sees, hidden)
        logits = self.model(input_ids=input_ids, use_cache=False, **masks).logits
        logits = logits.flatten(0, 1)  # (B S, V)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, LOGITS_PER_CHUNK // logits.shape[1])
        for part, targets in zip(logits.split(rows), labels.flatten().split(rows), strict=True):
            total += F.cross_entropy(part.float(), targets, ignore_index=IGNORE, reduction="sum")
        return total


def _measure(
    model: nn.Module,
    data: TokenDataset,
    micro_batch_size: int,
    limit: int | None,
    dtype: str,
    notes: list[str],
    device: torch.device,
) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    batches = EvaluationBatches(
        data,
        micro_batch_size=micro_batch_size,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        world_size=world,
        max_targets=limit,
        defer_errors=world > 1,
    )
    result = asdict(evaluate(model, batches, device))
    raise_on_any_rank(batches.error)
    available = batches.num_targets
    if limit is not None:
        everything = EvaluationBatches(data, micro_batch_size=micro_batch_size)
        available = everything.num_targets
    return result | {
        "available_tokens": available,
        "data": [str(source.path) for source in data.sources],
        "samples": batches.num_samples,
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "document_mask": data.document_mask,
        "micro_batch_size": micro_batch_size,
        "dtype": dtype,
        "ranks": world,
        "device": device.type,
        "notes": [*notes, PUBLISHED],
    }


def _data_of_run(config: RunConfig, request: Request) -> TokenDataset:
    length = request.sequence_length or config.data.sequence_length
    samples = _samples(request, length, config.data.packing, config.data.document_mask)
    if request.data:
        return _open(request.data, request.split, samples)
    if request.split == "train":
        return _open([source.path for source in config.data.train], "train", samples)
    sets = validation_folders(config)
    if not sets:
        raise UserError("the run had no validation data: name some with --data FOLDER")
    return _open(next(iter(sets.values())), "validation", samples)


def _open(paths: Any, split: str, samples: dict[str, Any]) -> TokenDataset:
    opener = open_training_data if split == "train" else open_validation_data
    return opener(list(paths), **samples)


def _check_tokenizer_of_run(config: RunConfig, data: TokenDataset) -> list[str]:
    """Notes on checks that were not possible; UserError if the data does not match the run."""
    if config.model.vocab_size is not None:
        check_vocabulary(data, config.model.vocab_size)
    folder = Path(config.data.train[0].path)
    if not folder.exists():
        return [f"{folder}, the training data, is gone: tokenizers were not compared"]
    trained = load_manifest(folder).tokenizer
    if trained.fingerprint == data.tokenizer.fingerprint:
        return []
    difference = tokenizer_difference(
        open_tokenizer(folder / trained.path), open_tokenizer(data.tokenizer_path)
    )
    if difference is not None:
        raise UserError(
            f"{data.sources[0].path} was made with another tokenizer than the run's {folder}: "
            f"{difference}; preprocess both with one"
        )
    return []


def _check_tokenizer_of_model(folder: Path, data: TokenDataset) -> list[str]:
    if not holds_tokenizer(folder):
        return [f"{folder} holds no tokenizer: tokenizers were not compared"]
    check_same_tokenizers(data, folder)
    return []


def open_transformers(folder: Path) -> Any:
    """The causal language model of a transformers folder, on the CPU, in its own dtype.

    Factorized folders are opened too. Code in the folder is never run.

    Raises:
        UserError: transformers cannot load it.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: give a folder with a model")
    raw = read_json_object(folder / "config.json")
    kind = str(raw.get("model_type"))
    if kind in IMPORTED:
        load_config(folder)  # checks types and limits before transformers allocates anything
    elif kind.startswith(FACTORIZED_PREFIX):
        check_field_types(folder / "config.json", raw)
    from transformers import AutoModelForCausalLM

    import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises nearly anything for a bad folder
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs the folder's own code, which is not run"
        raise UserError(f"{folder}: transformers cannot load a model ({reason})") from error
