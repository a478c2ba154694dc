"""Checkpoints as files: saving, finding, loading, retention, other layouts.

In: an engine, or a run's folder. Out: files with a manifest, or the state in them by parameter.
Must not know: the training loop, the layout of the engine's own buffers.
"""

from megalr.checkpoint.reader import open_checkpoint
from megalr.checkpoint.universal import read_universal

__all__ = ["open_checkpoint", "read_universal"]
