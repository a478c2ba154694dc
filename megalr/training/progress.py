"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is; saved in every checkpoint.

    Attributes:
        update: updates done, skipped ones included.
        tokens: targets consumed.
        batch_offset: the next batch is number ``update + batch_offset``; grows with every rollback
            by the number of batches that it leaves out.
        evaluation_pending: the evaluation after the last update is still to be made.
    """

    update: int = 0
    tokens: int = 0
    batch_offset: int = 0
    evaluation_pending: bool = False

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TrainProgress:
        """The position in what a checkpoint says."""
        return cls(**{field.name: saved[field.name] for field in fields(cls)})

    @property
    def next_batch(self) -> int:
        """Number of the next update's batch."""
        return self.update + self.batch_offset
