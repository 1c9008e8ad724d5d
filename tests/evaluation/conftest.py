from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("model") / "a", seed=3)


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory, parent: Path) -> Path:
    import tiny

    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), parent)
