"""mergekit's executor on tensors that are in memory already, so that it reads no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file


class _Resident:
    """What mergekit asks of a model's files, answered from memory."""

    def __init__(self, path: Path) -> None:
        file = path / "model.safetensors"
        self._weights = load_file(file)
        self.index = SimpleNamespace(tensor_paths=dict.fromkeys(self._weights, str(file)))

    def get_tensor(self, key: str, device: str = "cpu", aliases: Any = None) -> torch.Tensor:
        return self._weights[key].to(device)

    def flush(self) -> None:
        """Nothing is open."""


def mergekit_merge(body: Mapping[str, Any], paths: Mapping[str, Path]) -> Callable[[], None]:
    """A merge, planned; what is returned runs its executor, and drops every tensor as it comes."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, _model_out_config
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(body)
    options = MergeOptions(quiet=True, device="cpu", low_cpu_memory=False)
    cache = LoaderCache()
    cache.setup(options)
    for reference in config.referenced_models():
        if reference not in cache.loaders:
            cache.loaders[reference] = _Resident(Path(reference.model.path))
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=_model_out_config(config, architecture),
    )
    # plan_in_memory of 0.1.5 raises: it gives its tasks a field they do not have
    planner._plan()
    tasks = [task for _, task in planner._tensors]

    def run() -> None:
        for _, tensor in Executor(tasks, math_device="cpu", storage_device="cpu").run(quiet=True):
            del tensor

    return run


def forget() -> None:
    """Drop the models that mergekit holds."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache().loaders.clear()
