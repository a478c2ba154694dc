"""Checkpoints as files: manifests, retention, reading without an engine, other shapes."""

from megalr.checkpoint.reader import open_checkpoint
from megalr.checkpoint.universal import read_universal

__all__ = ["open_checkpoint", "read_universal"]
