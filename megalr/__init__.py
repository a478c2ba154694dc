"""megalr: pretraining of language models whose weights are stored as factors.

``megalr train`` runs it on DeepSpeed. As a library (docs/library.md) it needs torch only:
the names below are loaded when they are first used, so ``import megalr`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megalr.version import __version__

if TYPE_CHECKING:
    from megalr import optim
    from megalr.errors import UserError
    from megalr.library.factorize import factorize_, factorized_layers, merge_, split_parameters
    from megalr.library.restarts import Restarts

__all__ = [
    "Restarts",
    "UserError",
    "__version__",
    "factorize_",
    "factorized_layers",
    "merge_",
    "optim",
    "split_parameters",
]

_MODULES = {
    "Restarts": "megalr.library.restarts",
    "UserError": "megalr.errors",
    "factorize_": "megalr.library.factorize",
    "factorized_layers": "megalr.library.factorize",
    "merge_": "megalr.library.factorize",
    "split_parameters": "megalr.library.factorize",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("megalr.optim")
    if name not in _MODULES:
        raise AttributeError(f"module 'megalr' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
