"""DeepSpeed's universal layout: one folder per parameter, whole tensors, independent of ranks.

``<tag>_universal/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,...}.pt`` hold ``{"param": tensor}`` as
DeepSpeed's own converter does; ``step.pt`` and other counters hold the value itself. Optimizer
state of a whole logical tensor is in ``tensors/<logical tensor>.pt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megalr.checkpoint.manifest import Damaged
from megalr.checkpoint.source import MASTER, SavedState, StateSource, TensorState, whole
from megalr.checkpoint.torch_files import load_mapped
from megalr.engine.checkpoint_files import write_tensors
from megalr.errors import UserError

PARAM = "param"
INDEX = "universal.pt"
"""File with the shapes, counters and state names of every parameter."""


def is_universal(folder: Path) -> bool:
    """Whether a checkpoint's folder is in the universal layout."""
    return (folder / INDEX).is_file()


def write_parameter(source: StateSource, name: str, folder: Path) -> list[str]:
    """Write one parameter; returns the files' paths relative to ``folder``. Raises OSError."""
    target = folder / "zero" / name
    target.mkdir(parents=True, exist_ok=True)
    for key in (MASTER, *source.element_states(name)):
        # A clone: a view would take the whole flat slice with it into the file.
        write_tensors({PARAM: whole(source, name, key).clone()}, target / f"{key}.pt")
    for key, value in source.scalars(name).items():
        write_tensors(value, target / f"{key}.pt")
    return [str(path.relative_to(folder)) for path in sorted(target.iterdir())]


def write_tensor_state(source: StateSource, logical: str, folder: Path) -> list[str]:
    """Write the state of a logical tensor as a whole; returns as :func:`write_parameter`."""
    target = folder / "tensors"
    target.mkdir(parents=True, exist_ok=True)
    state = source.tensor_state(logical)
    path = target / f"{logical}.pt"
    write_tensors({"averages": _cloned(state.averages), "matrix": _cloned(state.matrix)}, path)
    return [str(path.relative_to(folder))]


def write_index(source: StateSource, folder: Path) -> list[str]:
    """Write the table of contents; returns as :func:`write_parameter`."""
    parameters = {
        name: {
            "shape": list(source.shape(name)),
            "trained": source.trained(name),
            "elements": source.element_states(name),
            "scalars": list(source.scalars(name)),
        }
        for name in source.names()
    }
    write_tensors({"parameters": parameters, "tensors": source.logical_tensors()}, folder / INDEX)
    return [INDEX]


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}


class UniversalFolder:
    """A universal folder as a source; see :class:`megalr.checkpoint.source.StateSource`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = SavedState.read(folder)
        index = load_mapped(folder / INDEX)
        self._parameters: dict[str, Any] = index["parameters"]
        self._tensors: list[str] = index["tensors"]

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name]["shape"])

    def trained(self, name: str) -> bool:
        return bool(self._parameters[name]["trained"])

    def element_states(self, name: str) -> list[str]:
        return list(self._parameters[name]["elements"])

    def scalars(self, name: str) -> dict[str, Any]:
        folder = self.folder / "zero" / name
        return {key: load_mapped(folder / f"{key}.pt") for key in self._parameters[name]["scalars"]}

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        if name not in self._parameters:
            raise KeyError(name)
        return load_mapped(self.folder / "zero" / name / f"{key}.pt")[PARAM].view(-1)[start:stop]

    def logical_tensors(self) -> list[str]:
        return list(self._tensors)

    def tensor_state(self, logical: str) -> TensorState:
        if logical not in self._tensors:
            return TensorState()
        values = load_mapped(self.folder / "tensors" / f"{logical}.pt")
        return TensorState(values["averages"], values["matrix"])


class _Masters(Mapping[str, Tensor]):
    def __init__(self, source: UniversalFolder) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._source, name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.names())

    def __len__(self) -> int:
        return len(self._source.names())


def read_universal(folder: Path | str) -> Mapping[str, Tensor]:
    """All parameters of a universal folder by name: whole, float32, read on access.

    Raises:
        UserError: it is not a universal folder written by ``megalr reshape``.
    """
    path = Path(folder)
    if not is_universal(path):
        raise UserError(f"{path} is no universal checkpoint: make one by `megalr reshape`")
    try:
        return _Masters(UniversalFolder(path))
    except Damaged as error:
        raise UserError(f"universal checkpoint {path} is damaged: {error}") from error
