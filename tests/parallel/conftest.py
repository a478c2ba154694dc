"""Data that the tests of tensor parallelism train on."""

from tests.training.conftest import data

__all__ = ["data"]
