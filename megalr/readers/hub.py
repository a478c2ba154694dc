"""Text streamed from the Hugging Face hub by ``datasets``.

``hub:DATASET[:CONFIG[:SPLIT]]`` names a data set; the split is ``train`` by default. A local folder
in the layout of a hub's data set is opened the same way. Nothing is stored: each file of the data
set is an input split of its own, read in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from megalr.errors import UserError

HUB_PREFIX = "hub:"
ROWS = 256  # documents yielded at a time


def _open(name: str) -> Any:
    """The named data set, streaming."""
    dataset, _, rest = name.removeprefix(HUB_PREFIX).partition(":")
    config, _, split = rest.partition(":")
    if not config and dataset == "allenai/c4":
        config = "en"  # the data set has no default and English is the one people mean
    import datasets

    try:
        return datasets.load_dataset(
            dataset, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
        raise UserError(_unreachable(name, error)) from None


def _unreachable(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{name}: cannot read this data set from the Hugging Face hub ({reason}); check the name "
        f"and the network, or give local files to --input"
    )


def hub_shards(name: str) -> int:
    """Number of files of the data set; each becomes one shard.

    Raises UserError if the hub cannot be reached or has no such data set.
    """
    return int(_open(name).num_shards)


def hub_rows(name: str, number: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of file ``number`` of ``count`` of the data set, in lists."""
    source = iter(_open(name).shard(num_shards=count, index=number))
    while True:
        try:
            rows = list(itertools.islice(source, ROWS))
        except Exception as error:  # as in _open
            raise UserError(_unreachable(name, error)) from None
        if not rows:
            return
        yield rows
