"""megalr: pretraining of language models whose weights are stored as factors, on DeepSpeed."""

from megalr.version import __version__

__all__ = ["__version__"]
