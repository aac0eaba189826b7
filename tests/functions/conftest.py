"""A model whose mask reads it, with its class as it was."""

import pytest

from tests.functions.capturing import Model


@pytest.fixture
def model():
    yield Model()
    Model.shift = 1
