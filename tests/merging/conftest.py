"""Small model families on disk: real Llama checkpoints with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.merging.merge_cases import make_family


@pytest.fixture(autouse=True)
def _one_thread_and_own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """``family_of(tied=…, dtype=…)``: a base and two experts; made once, never to be changed."""
    made: dict[tuple[bool, torch.dtype], dict[str, Path]] = {}

    def get(tied: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
        if (tied, dtype) not in made:
            made[tied, dtype] = make_family(tmp_path_factory.mktemp("family"), tied, dtype)
        return made[tied, dtype]

    return get


@pytest.fixture
def own_family(tmp_path: Path) -> dict[str, Path]:
    """A family that a test may spoil."""
    return make_family(tmp_path / "own", tied=False, dtype=torch.float32)
