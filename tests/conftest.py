"""What every test shares: no network, one tiny model family, and a config that needs no model."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from agentmerge.demo.family import TinyFamily, cached_family

# Started in the background, a shell's command ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same cases every time; `--hypothesis-profile=default` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; for modules that skip themselves where it or playwright is missing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def family() -> TinyFamily:
    """A base and two experts (shift, sort), from the cache or trained in under a minute."""
    return cached_family(("shift", "sort"), 0)


@pytest.fixture(scope="session")
def fake_config() -> str:
    """A config's text: a search on the fake worker, over in under a second."""
    return """\
genome:
  models: [north, south]
  base_model: base
  merge_method: task_arithmetic
  layer_granularity: 2
tasks:
  - name: one
  - name: two
    weight: 0.5
limit: 40
search: {algorithm: cma_es, seed: 3, population: 5}
worker: {kind: fake}
budget: {max_evaluations: 19}
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``device``, and names none itself, runs on every one that there is."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "device" in metafunc.fixturenames and not any("device" in names for names in own):
        from agentmerge.session.selftest import devices

        metafunc.parametrize("device", devices(), scope="module")
