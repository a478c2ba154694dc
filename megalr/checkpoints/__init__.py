"""Checkpoints as files: manifests, retention, reading without an engine, other shapes.

Nothing here is collective; :mod:`megalr.training.checkpoint` calls it on all ranks together.
"""

from megalr.checkpoints.reader import open_checkpoint
from megalr.checkpoints.universal import read_universal

__all__ = ["open_checkpoint", "read_universal"]
