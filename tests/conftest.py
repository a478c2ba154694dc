"""Data that all tests of training use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.synthetic import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic data set with a validation split."""
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic")
