"""A dense transformers folder to a factorized one, one block at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megalr.compression.best_factors import Factors, best_factors, root_of
from megalr.compression.calibration import (
    CalibrationOptions,
    perplexity,
    read_windows,
    second_moments,
    source_of_input,
)
from megalr.compression.dense_model import HEAD, BlockLinear, DenseModel
from megalr.errors import UserError
from megalr.hf.card import model_card
from megalr.hf.modeling_factorized import FACTORIZED, SHARED_INPUT, TRANSFORMERS
from megalr.hf.pretrained_config import first_line
from megalr.hf.write import DTYPES, check_output, new_folder
from megalr.preprocessing.compare_tokenizers import PROBES
from megalr.preprocessing.tokenizer import HUGGINGFACE_FILES, holds_tokenizer
from megalr.version import __version__

SHARD_SIZE = "2GB"
"""Largest weight file; one is in memory while it is filled."""
COPIED = ("generation_config.json", "chat_template*", "LICENSE*", "NOTICE*", "*[Ll]icense*")
"""Files that are copied besides those of the tokenizer."""
Show = Callable[[int, int], None]
"""Is given the number of blocks that are factorized, and of all."""


@dataclass(frozen=True)
class CompressionOptions:
    """What is factorized, and how it is stored.

    Attributes:
        rank: r of every matrix; None: from ``rank_share``.
        rank_share: r relative to the smaller side of each matrix, above 0 and at most 1.
        targets: linear layers by their last part (``q_proj``) or both (``mlp.up_proj``); None: all
            of the blocks.
        dtype: key of ``megalr.hf.write.DTYPES``; None: that of the model's files.

    Raises:
        UserError: not exactly one of ``rank`` and ``rank_share``, or a share out of range.
    """

    rank: int | None = None
    rank_share: float | None = None
    targets: tuple[str, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.rank_share is None):
            raise UserError("give either --rank or --rank_share")
        if self.rank_share is not None and not 0 < self.rank_share <= 1:
            raise UserError(f"--rank_share {self.rank_share}: must be above 0 and at most 1")


@dataclass
class Outcome:
    """What was written.

    Attributes:
        ranks: by linear layer of a block.
        numbers: parameters before and after.
        errors: ``|(W - B A) R| / |W R|`` by full name of a matrix, R the root of the second moment
            of its inputs, or I without calibration.
        perplexities: of the dense and the factorized model on calibration windows that the
            statistics do not include; None without calibration.
        notes: what the user should know.
    """

    ranks: dict[str, int]
    numbers: tuple[int, int] = (0, 0)
    errors: dict[str, float] = field(default_factory=dict)
    perplexities: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)


def compress_folder(
    folder: Path,
    output: Path,
    options: CompressionOptions,
    calibration: CalibrationOptions | None = None,
    show: Show = lambda done, total: None,
) -> Outcome:
    """Write the model in ``folder`` with factors to ``output``; all of it or nothing.

    Without ``calibration`` the factors are truncated SVDs, and memory holds one block and one
    weight file. With it they are the best for the inputs that the text gives each layer; then
    the whole model is in memory while it reads the text, and one (n, n) float32 matrix for
    each different input. Computed on CUDA where there is a device, in float64.

    Raises:
        UserError: a model, rank, target or text that does not fit; nothing is left at ``output``.
    """
    check_output(output)
    model = DenseModel(folder)
    ranks = chosen_ranks(model.linears, options)
    outcome = Outcome(ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moments: dict[str, torch.Tensor] = {}
    dense = held_out = None
    if calibration is not None:
        widest = max((model.linears[name] for name in ranks), key=lambda each: each.inputs)
        windows = read_windows(model, calibration, widest)
        held_out = windows.held_out
        causal = _load(TRANSFORMERS[model.family][2], folder, model, device)
        names = [f"{block}.{name}" for block in model.blocks for name in ranks]
        moments = second_moments(causal, names, windows.statistics)
        dense = perplexity(causal, held_out)
        del causal
    with new_folder(output) as temporary:
        dtype = DTYPES[options.dtype] if options.dtype else model.weights.dtype
        config = model.factorized_config(ranks)
        config.dtype = dtype
        config.save_pretrained(temporary)
        _write_tensors(model, config, temporary, dtype, moments, outcome, show)
        _copy_files(folder, temporary, outcome)
        if dense is not None and held_out is not None:
            causal = _load(FACTORIZED[model.family][2], temporary, model, device)
            outcome.perplexities = dense, perplexity(causal, held_out)
        card = _card(model, options, calibration, outcome, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return outcome


def chosen_ranks(linears: dict[str, BlockLinear], options: CompressionOptions) -> dict[str, int]:
    """The rank of every linear layer that is factorized, by its name in a block.

    Raises:
        UserError: an unknown target, or a rank above a matrix's smaller side.
    """
    for word in options.targets or ():
        if not any(f".{name}".endswith(f".{word}") for name in linears):
            raise UserError(
                f"--targets {word}: a block has no such linear layer, it has {', '.join(linears)}"
            )
    chosen = {
        name: linear
        for name, linear in linears.items()
        if options.targets is None
        or any(f".{name}".endswith(f".{word}") for word in options.targets)
    }
    if options.rank_share is not None:
        return {n: max(1, round(options.rank_share * each.side)) for n, each in chosen.items()}
    rank = options.rank or 0
    for name, linear in chosen.items():
        if not 1 <= rank <= linear.side:
            sizes = f"{'+'.join(map(str, linear.parts))} x {linear.inputs}"
            raise UserError(
                f"--rank {rank}: {name} is {sizes}, so its rank is 1 to {linear.side}: lower the "
                "rank, leave the layer out of --targets, or give --rank_share"
            )
    return dict.fromkeys(chosen, rank)


def _load(kind: Any, folder: Path, model: DenseModel, device: torch.device) -> Any:
    """The causal language model, float32 on a CPU, else in the dtype of its files."""
    dtype = torch.float32 if device.type == "cpu" else model.weights.dtype
    try:
        causal = kind.from_pretrained(str(folder), local_files_only=True, dtype=dtype)
    except Exception as error:  # transformers raises nearly anything for a bad folder
        raise UserError(
            f"{folder}: transformers cannot load the model ({first_line(error)})"
        ) from error
    return causal.to(device).eval()


# -- tensors -------------------------------------------------------------------------------


def _write_tensors(
    model: DenseModel,
    config: Any,
    folder: Path,
    dtype: torch.dtype,
    moments: dict[str, torch.Tensor],
    outcome: Outcome,
    show: Show,
) -> None:
    """Fill the weight files one after the other; errors and sizes go into ``outcome``."""
    from huggingface_hub import split_torch_state_dict_into_shards

    causal: Any = FACTORIZED[model.family][2]
    with torch.device("meta"):
        planned = causal._from_config(config, dtype=dtype)
    tied = {HEAD} if config.tie_word_embeddings else set()
    expected = {n: t for n, t in planned.state_dict().items() if n not in tied}
    outcome.numbers = (
        sum(map(model.count, model.names)),
        sum(tensor.numel() for tensor in expected.values()),
    )
    plan = split_torch_state_dict_into_shards(expected, max_shard_size=SHARD_SIZE)
    tensors = _tensors(model, expected, moments, outcome, show)
    ready: dict[str, torch.Tensor] = {}
    for file, names in plan.filename_to_tensors.items():
        while not set(names) <= ready.keys():
            name, tensor = next(tensors)
            ready[name] = tensor.to(dtype, copy=True).contiguous().cpu()
            if not bool(ready[name].isfinite().all()):
                raise UserError(f"{name}: too large for {dtype}: use --dtype bfloat16")
        save_file({n: ready.pop(n) for n in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tensors(
    model: DenseModel,
    expected: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    outcome: Outcome,
    show: Show,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all of the factorized model, block by block, the head last."""
    inside = tuple(f"{block}." for block in model.blocks)
    outside = [name for name in model.names if not name.startswith(inside)]
    yield from ((name, model[name]) for name in outside if name != HEAD)
    for number, block in enumerate(model.blocks):
        show(number, len(model.blocks))
        for name in model.names:
            if name.startswith(inside[number]) and name in expected:  # it stays as it is
                yield name, model[name]
        roots: dict[str, torch.Tensor] = {}
        shared: dict[str, dict[str, torch.Tensor]] = {}
        for name, rank in outcome.ranks.items():
            linear, full = model.linears[name], f"{block}.{name}"
            source = source_of_input(full)
            if source in moments and source not in roots:
                roots[source] = root_of(moments[source])
            found = _factorized(model, block, linear, rank, roots.get(source), outcome)
            a = torch.cat([each.a for each in found])  # (parts r, n)
            if f"{full}.a.weight" in expected:
                yield f"{full}.a.weight", a
            else:
                parent, _, leaf = name.partition(".")
                shared.setdefault(parent, {})[leaf] = a
            bias = model[f"{full}.bias"] if f"{full}.bias" in model.names else None
            biases = [None] * len(found) if bias is None else list(bias.split(linear.parts))
            for index, (each, own) in enumerate(zip(found, biases, strict=True)):
                stem = f"{full}.b" if len(found) == 1 else f"{full}.b.{index}"
                yield f"{stem}.weight", each.b
                if own is not None:
                    yield f"{stem}.bias", own
        for parent, parts in shared.items():
            stacked = torch.cat([parts[leaf] for leaf in SHARED_INPUT[parent]])
            yield f"{block}.{parent}.shared_a.weight", stacked
    show(len(model.blocks), len(model.blocks))
    if HEAD in outside:
        yield HEAD, model[HEAD]


def _factorized(
    model: DenseModel,
    block: str,
    linear: BlockLinear,
    rank: int,
    root: torch.Tensor | None,
    outcome: Outcome,
) -> list[Factors]:
    """The factors of the matrices of one linear layer; their errors go into ``outcome``."""
    full = f"{block}.{linear.name}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for index, weight in enumerate(model.matrices(block, linear)):
        name = full if len(linear.parts) == 1 else f"{full}[{index}]"
        found.append(best_factors(name, weight.to(device), rank, root))
        outcome.errors[name] = found[-1].error
    return found


# -- files beside the weights --------------------------------------------------------------


def _copy_files(folder: Path, output: Path, outcome: Outcome) -> None:
    """Copy the tokenizer and other files; a note instead of a tokenizer that would change."""
    patterns = [*HUGGINGFACE_FILES, *COPIED]
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in files:
        shutil.copyfile(path, output / path.name)
    if not holds_tokenizer(folder):
        outcome.notes.append(f"{folder} holds no tokenizer, so none was written")
        return
    if _encoded(folder) != _encoded(output):
        for pattern in HUGGINGFACE_FILES:
            for path in output.glob(pattern):
                path.unlink()
        outcome.notes.append(
            "transformers would load another tokenizer from the written folder, so none was "
            f"written: load that of {folder}"
        )


def _encoded(folder: Path) -> Any:
    """Ids of probe texts and the size of the vocabulary, by the folder's tokenizer."""
    from transformers import AutoTokenizer

    import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return len(loaded), [loaded(line)["input_ids"] for line in PROBES]
    except Exception as error:  # transformers raises nearly anything for what it cannot load
        return first_line(error)


def _card(
    model: DenseModel,
    options: CompressionOptions,
    calibration: CalibrationOptions | None,
    outcome: Outcome,
    dtype: torch.dtype,
) -> str:
    errors: Sequence[float] = list(outcome.errors.values())
    before, after = outcome.numbers
    rows: dict[str, Any] = {
        "made of": f"{model.folder.resolve().name} ({model.family}, {len(model.blocks)} layers)",
        "ranks": ", ".join(f"{name} {rank}" for name, rank in outcome.ranks.items()),
        "factors": "truncated SVD",
        "parameters": f"{after:,} instead of {before:,}",
        "error of the matrices": f"{sum(errors) / len(errors):.4f} (largest {max(errors):.4f})",
        "dtype of these weights": str(dtype).removeprefix("torch."),
        "megalr": __version__,
    }
    if outcome.perplexities is not None and calibration is not None:
        rows["factors"] = "least error of the products for the inputs of the calibration text"
        rows["calibration text"] = ", ".join(Path(path).name for path in calibration.data)
        rows["perplexity of the dense model"] = outcome.perplexities[0]
        rows["perplexity of this model"] = outcome.perplexities[1]
        rows["perplexities on"] = "windows of the calibration text kept for it"
    origin = "A language model whose matrices megalr factorized after training."
    name = f"{model.folder.resolve().name}, factorized"
    return model_card(name, [model.family], rows, factorized=True, origin=origin)
