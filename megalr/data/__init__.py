"""Text to token shards, and token shards to batches.

Reading (what training uses): :func:`open_training_data`, :func:`open_validation_data`,
:class:`UpdateLoader`, :class:`EvaluationBatches`, :func:`check_vocabulary`.
"""

from megalr.data.dataset import (
    TokenDataset,
    check_same_tokenizer,
    check_vocabulary,
    has_validation_split,
    open_training_data,
    open_validation_data,
)
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
