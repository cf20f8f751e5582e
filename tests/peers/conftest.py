"""Peers are imported by fixtures, not by modules: a plain run neither needs them nor pays for their
import."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest

PEERS_MARK = "peers"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a peers test."""
    for item in items:
        if "peers" in item.path.parts:
            item.add_marker(PEERS_MARK)


def peer(name: str) -> ModuleType:
    """Import a peer, silently (their own deprecations are not ours), or skip the test if it is not
    installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs the extra `peers`: {error}")


@pytest.fixture(autouse=True)
def their_warnings_are_not_errors() -> Iterator[None]:
    """Warnings of the peers do not fail our tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch on one thread."""
    module = peer("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def transformers(torch: ModuleType) -> ModuleType:
    """transformers."""
    return peer("transformers")


@pytest.fixture(scope="session")
def peft(transformers: ModuleType) -> ModuleType:
    """PEFT."""
    return peer("peft")
