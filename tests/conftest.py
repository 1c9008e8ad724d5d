"""What every test shares: no network, and one tiny model family, trained once a machine."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from agentmerge.demo.family import Family, cached_family


@pytest.fixture(scope="session")
def family() -> Family:
    """A base and two experts (shift, sort), from the cache or trained in under a minute."""
    return cached_family(("shift", "sort"), 0)
