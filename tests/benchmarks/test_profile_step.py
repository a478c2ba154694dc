"""The profile of an update says what each memory pool holds."""

from __future__ import annotations

from typing import Any

from profile_step import half_empty_table, memory_table

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


def test_what_holds_a_half_empty_segment_is_named() -> None:
    held = segment((0, 0), (1, "inactive"), (0.25, "active_allocated"), (0.5, "active_allocated"))
    frames = [("torch/nn.py", "empty"), ("/x/megalr/a.py", "build"), ("/x/deepspeed/b.py", "step")]
    held["blocks"][1]["frames"] = [
        {"filename": file, "line": 7, "name": name} for file, name in frames
    ]
    full = segment((0, 0), (2, "active_allocated"), (0.01, "inactive"))
    of_a_graph = segment((0, 1), (0.5, "active_allocated"), (1, "inactive"))
    assert half_empty_table([full, of_a_graph, held]).splitlines() == [
        "segment of 1792 MiB, 1024 unused, in use:",
        "  512.00 MiB, unknown",
        "  256.00 MiB, a.py:7 build < b.py:7 step",
    ]
