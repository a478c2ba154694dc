"""The profile of an update says what each memory pool holds."""

from __future__ import annotations

from typing import Any

from profile_step import memory_table

from megalr.estimate.memory import GIB


def segment(pool: tuple[int, int], *blocks: tuple[float, str]) -> dict[str, Any]:
    """One of ``torch.cuda.memory_snapshot``, of blocks of so many GiB."""
    listed = [{"size": int(size * GIB), "state": state} for size, state in blocks]
    total = sum(block["size"] for block in listed)
    return {"segment_pool_id": pool, "total_size": total, "blocks": listed}


def test_every_pool_has_its_own_line() -> None:
    used, freed, unused = "active_allocated", "active_awaiting_free", "inactive"
    snapshot = [
        segment((0, 1), (2, used), (0.5, unused), (1, freed)),
        segment((0, 0), (3, used)),
        segment((0, 1), (0.25, unused), (0.25, used), (1, unused)),
    ]
    assert memory_table(snapshot).splitlines() == [
        "pool (0, 0): 3.000 GiB reserved in 1 segments, 3.000 used, 0.000 unused in 0 pieces, "
        "the largest of MiB ",
        "pool (0, 1): 5.000 GiB reserved in 2 segments, 3.250 used, 1.750 unused in 3 pieces, "
        "the largest of MiB 1024, 512, 256",
    ]
