from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # the tiny family


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    """transformers normalizes in float32 whatever the model: too coarse for finite differences."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * x * torch.rsqrt(size)

    with pytest.MonkeyPatch.context() as patch:
        for norm in (LlamaRMSNorm, Qwen2RMSNorm):
            patch.setattr(norm, "forward", forward)
        yield


@pytest.fixture(scope="session")
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> dict[str, Path]:
    """A base and two experts near it."""
    import tiny

    root = tmp_path_factory.mktemp("family")
    base = tiny.write_model(root / "base", seed=3)
    return {
        "base": base,
        "b": tiny.write_model(root / "b", seed=4, near=base),
        "c": tiny.write_model(root / "c", seed=5, near=base),
    }


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory, parents: dict[str, Path]) -> Path:
    import tiny

    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), parents["base"])


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> dict[str, Path]:
    """The same with heads that vLLM's CPU build has, and room for prompts over a cache block."""
    import tiny

    return tiny.write_family(tmp_path_factory.mktemp("tied"), max_position_embeddings=256)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> dict[str, Path]:
    import tiny

    return tiny.write_family(
        tmp_path_factory.mktemp("untied"), tie_word_embeddings=False, max_position_embeddings=256
    )
