"""Fixtures for all test files; the functions behind them are in helpers.py."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import CONFIGS, GQA, FakeTask, make_model
from slow_tests import SLOW

from minilora.config import ModelConfig
from minilora.kernels import has_vectors
from minilora.transformer import Transformer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long campaigns."""
    seen = dict.fromkeys(SLOW, 0)
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        for start, every in SLOW.items():
            if name.startswith(start):
                if every == 0 or seen[start] % every:
                    item.add_marker(pytest.mark.slow)
                seen[start] += 1


@pytest.fixture(scope="session", autouse=True)
def loaded_kernels() -> None:
    """Import compiled code before anything is measured: it is loaded on first use."""
    has_vectors()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each small architecture in turn."""
    return request.param


@pytest.fixture
def base() -> Transformer:
    """A frozen float32 base model, two layers, grouped queries, untied head."""
    return make_model(GQA, dtype=np.float32, trainable=False)


@pytest.fixture
def fake_task() -> FakeTask:
    """A task in memory."""
    return FakeTask()


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)
