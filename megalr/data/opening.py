"""Opening data folders as one data set, and checks against a model or another data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megalr.data.dataset import TokenDataset
from megalr.data.manifest import check_sizes, load_manifest
from megalr.data.mapped_file import FileStamp
from megalr.errors import UserError

DataPath = str | Path | Mapping[str, Any]


def _parse_item(item: DataPath) -> tuple[Path, Fraction | None]:
    if not isinstance(item, Mapping):
        return Path(item), None
    unknown = sorted(set(item) - {"path", "weight"})
    if unknown or "path" not in item:
        raise UserError(
            f"data source {dict(item)}: the keys are 'path' and 'weight', "
            + (f"not '{unknown[0]}'" if unknown else "'path' is missing")
        )
    weight = item.get("weight")
    if weight is None:
        return Path(item["path"]), None
    try:
        value = Fraction(str(weight))  # of the decimal as written: 0.1 is one tenth
    except ValueError:
        value = Fraction(0)
    if value <= 0:
        raise UserError(f"data source {item['path']}: weight {weight!r} must be a positive number")
    return Path(item["path"]), value


def _open(
    data: DataPath | Sequence[DataPath],
    split: str,
    sequence_length: int,
    packing: bool,
    document_mask: bool,
) -> TokenDataset:
    items = [data] if isinstance(data, str | Path | Mapping) else list(data)
    if not items:
        raise UserError("no data set was given; set data.train to a preprocessed folder")
    parsed = [_parse_item(item) for item in items]
    given = [weight for _, weight in parsed if weight is not None]
    if given and len(given) < len(parsed):
        missing = next(path for path, weight in parsed if weight is None)
        raise UserError(f"data source {missing} has no weight and others have; give all or none")
    if given and split == "validation":
        raise UserError("data.validation takes no weights: every sample is evaluated once")
    manifests = []
    stamps: dict[str, FileStamp] = {}
    for path, _ in parsed:
        manifest = load_manifest(path)
        folder = path if path.is_dir() else path.parent
        shards = manifest.split(split)
        if split == "validation" and not shards:
            shards = manifest.shards  # a data set made for validation only need not say so
        if not shards:
            raise UserError(f"{path}: no shard of the split '{split}'")
        stamps |= check_sizes(folder, shards)
        manifests.append((folder, manifest, shards))
    return TokenDataset(manifests, sequence_length, packing, given or None, stamps, document_mask)


def open_training_data(
    train: DataPath | Sequence[DataPath],
    *,
    sequence_length: int,
    packing: bool = True,
    document_mask: bool = False,
) -> TokenDataset:
    """Open the ``train`` split of a data folder, or of several as a mixture.

    ``train`` is a folder, or a list of folders (one pool, every sample once an epoch), or a list of
    ``{"path": folder, "weight": w}`` (samples drawn in the proportion of the weights).
    """
    return _open(train, "train", sequence_length, packing, document_mask)


def open_validation_data(
    validation: DataPath | Sequence[DataPath],
    *,
    sequence_length: int,
    packing: bool = True,
    document_mask: bool = False,
) -> TokenDataset:
    """Open the ``validation`` split of a data folder; all of it if it has no such split.

    A list of folders is one pool; weights have no meaning here and are refused.
    """
    return _open(validation, "validation", sequence_length, packing, document_mask)


def has_validation_split(train: DataPath) -> bool:
    """Whether the data folder holds a validation split of its own."""
    return bool(load_manifest(_parse_item(train)[0]).split("validation"))


def check_vocabulary(dataset: TokenDataset, model_vocab_size: int) -> None:
    """UserError unless every id of the tokenizer has a row in the model's embedding."""
    if dataset.vocab_size > model_vocab_size:
        raise UserError(
            f"{dataset.sources[0].path}: the tokenizer has {dataset.vocab_size} ids (largest in "
            f"the data {dataset.max_id}) and model.vocab_size is {model_vocab_size}; set "
            f"model.vocab_size to at least {dataset.vocab_size}"
        )


def check_same_tokenizer(first: TokenDataset, second: TokenDataset) -> None:
    """UserError unless both data sets were made with the same tokenizer."""
    if first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        raise UserError(
            f"{first.sources[0].path} and {second.sources[0].path} were made with different "
            f"tokenizers ({first.tokenizer.fingerprint[:12]}, "
            f"{second.tokenizer.fingerprint[:12]}); preprocess both with one"
        )
