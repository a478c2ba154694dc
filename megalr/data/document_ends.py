"""Documents inside packed windows, from the index of their shard.

A window is a run of consecutive tokens of a shard. A document that began before it is seen from the
window's first token on. Only the index says where documents start; ids (EOS) are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalr.data.manifest import ShardEntry
from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError

Integers = NDArray[np.int64]


def check_document_ends(folder: Path, shards: Sequence[ShardEntry], sequence_length: int) -> None:
    """UserError if no shard of a source has a document end inside it, but windows do end there.

    That is what a conversion leaves which has concatenated its documents before.
    """
    if all(shard.documents <= 1 for shard in shards) and any(
        shard.tokens > sequence_length for shard in shards
    ):
        raise UserError(
            f"{folder}: data.document_mask is true and each of its {len(shards)} shards is one "
            f"document ({sum(shard.tokens for shard in shards)} tokens in all), so there are no "
            "document ends: preprocess the documents one by one, or set data.document_mask=false"
        )


def count_starts(shard: IndexedShard, first: Integers, count: Integers) -> Integers:
    """Documents that start at the ``count`` tokens behind token ``first``; all int64 (n,)."""
    return shard.documents_before(first + count + 1) - shard.documents_before(first + 1)


def mark_starts(
    shard: IndexedShard, first: Integers, count: Integers, rows: Integers, out: NDArray[np.int32]
) -> None:
    """``out[row, t] = t`` where a document starts at the window's token t > 0.

    Args:
        shard: of the windows.
        first: first token of each window, (n,).
        count: tokens of each window, (n,).
        rows: of ``out``, (n,).
        out: zeros, (rows, tokens of the longest window).

    Raises:
        UserError: as :meth:`IndexedShard.starts_inside`.
    """
    for row, token, length in zip(rows.tolist(), first.tolist(), count.tolist(), strict=True):
        for start in shard.starts_inside(token, length):
            out[row, start - token] = start - token


def positions_in_documents(starts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Place of each token in the visible part of its document, from 0, (n, S) int32.

    ``starts (n, S)`` as from :func:`mark_starts`: a document is where the place is 0 and on.
    """
    place = np.arange(starts.shape[1], dtype=np.int32)
    return place - np.maximum.accumulate(starts, axis=1)
