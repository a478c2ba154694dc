"""Token shards to batches.

In: data folders (manifest, ``.bin``/``.idx`` shards) and a seed. Out: batches as a function of
(seed, update). Must not know: text, tokenizers' files, models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megalr.data.dataset import TokenDataset
from megalr.data.opening import (
    check_same_tokenizer,
    check_vocabulary,
    has_validation_split,
    open_training_data,
    open_validation_data,
)

if TYPE_CHECKING:
    from megalr.data.loader import EvaluationBatches, UpdateBatch, UpdateLoader

__all__ = [
    "EvaluationBatches",
    "TokenDataset",
    "UpdateBatch",
    "UpdateLoader",
    "check_same_tokenizer",
    "check_vocabulary",
    "has_validation_split",
    "open_training_data",
    "open_validation_data",
]


def __getattr__(name: str) -> Any:
    """The batches need torch; preprocessing workers start without it."""
    if name in ("EvaluationBatches", "UpdateBatch", "UpdateLoader"):
        from megalr.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
