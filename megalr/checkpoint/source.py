"""Interface to a saved training state, independent of the layout it was saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from megalr.checkpoint.manifest import Damaged, first_problem, read_limited
from megalr.config.schema import RunConfig

STATE = "state.json"
MASTER = "fp32"
"""Key of a parameter's master weights among its per-element tensors; DeepSpeed's name."""

WORKING_DIRECTORY = "working_directory"
"""Key in the state of the loop: where relative paths in the configuration start from."""
EXTENSIONS = "extensions"
"""Key in the state of the loop: the learning rates of a run that was extended
(``megalr.run.extension``)."""


class _Counters(BaseModel, strict=True):
    global_steps: NonNegativeInt
    global_samples: NonNegativeInt
    skipped_steps: NonNegativeInt


class _LoopState(BaseModel, strict=True):
    tokens: NonNegativeInt
    batch_offset: NonNegativeInt = 0
    data_fingerprint: str = ""
    working_directory: str | None = None
    extensions: dict[str, Any] | None = None
    health: dict[str, Any] = {}
    restarts: dict[str, Any] = {}


class _StateFile(BaseModel, strict=True, extra="forbid"):
    update: NonNegativeInt
    config: dict[str, dict[str, Any]]
    engine: _Counters
    state: _LoopState


@dataclass(frozen=True)
class SavedState:
    """The file ``state.json`` of a checkpoint.

    Attributes:
        update: updates done.
        config: resolved configuration of the run when it was saved.
        engine: the engine's own counters.
        state: of the training loop; plain values.
    """

    update: int
    config: dict[str, Any]
    engine: dict[str, int]
    state: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Targets consumed so far."""
        return int(self.state["tokens"])

    @property
    def weights_alone(self) -> bool:
        """Whether there is no state of a loop to continue from (``megalr ranks``)."""
        return "batch_offset" not in self.state

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.__dict__, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> SavedState:
        """Read the file from a checkpoint's folder; raises Damaged."""
        try:
            content = read_limited(folder / STATE)
            _StateFile.model_validate_json(content)
            return cls(**json.loads(content))
        except ValidationError as error:
            raise Damaged(f"{STATE} is not a saved state ({first_problem(error)})") from error
        except (OSError, ValueError, TypeError) as error:
            raise Damaged(f"{STATE} cannot be read: {error}") from error

    def run_config(self) -> RunConfig:
        """The configuration as an object; raises Damaged if this version does not accept it."""
        try:
            return RunConfig.model_validate(self.config)
        except ValidationError as error:
            raise Damaged(
                f"the configuration in {STATE} is not one of this version: {error}"
            ) from error


@dataclass
class TensorState:
    """Optimizer state that belongs to one logical tensor as a whole.

    Attributes:
        averages: scalars by name (Stable-SPAM), 0-dim tensors.
        matrix: states of a whole matrix by name (projector, moments in its space, ...).
    """

    averages: dict[str, Tensor] = field(default_factory=dict)
    matrix: dict[str, Any] = field(default_factory=dict)


class StateSource(Protocol):
    """Masters and optimizer states by parameter, in the shapes of the unsharded model."""

    saved: SavedState

    def names(self) -> list[str]:
        """Names of all parameters."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, padding included."""

    def trained(self, name: str) -> bool:
        """Whether the optimizer updates it."""

    def element_states(self, name: str) -> list[str]:
        """Names of the optimizer's per-element states of a parameter; empty before update 1."""

    def scalars(self, name: str) -> dict[str, Any]:
        """The optimizer's counters for it (``step``, ...): numbers or 0-dim tensors."""

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened master (``fp32``) or of a per-element state."""

    def logical_tensors(self) -> list[str]:
        """Names of the logical tensors that have a :class:`TensorState`."""

    def tensor_state(self, logical: str) -> TensorState:
        """The :class:`TensorState` of a logical tensor; empty if it has none."""


def whole(source: StateSource, name: str, key: str = MASTER) -> Tensor:
    """The whole tensor of a parameter, in the shape of the parameter."""
    shape = source.shape(name)
    return source.elements(name, key, 0, torch.Size(shape).numel()).view(shape)
