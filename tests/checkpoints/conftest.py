"""Data that the tests of checkpoints train on."""

from tests.training.conftest import data

__all__ = ["data"]
