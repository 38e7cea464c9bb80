"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.fakes.mlflow import FakeMlflow


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    """A scriptable server in MLflow's place."""
    with FakeMlflow() as fake:
        yield fake
