"""A plain unit box, for objectives that are no merges: a strategy searches it as any space."""

from __future__ import annotations

from functools import lru_cache

from agentmerge.config import GenomeConfig
from agentmerge.space.grouped import SearchSpace


@lru_cache(maxsize=64)
def unit_box(dimensions: int) -> SearchSpace:
    """Every point is legal, and no axis is nearer to one than to another: one model an axis."""
    models = tuple(f"x{i}" for i in range(dimensions))
    genome = GenomeConfig(
        models=models if dimensions > 1 else (*models, "base"),
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=0,
        normalize=False,
    )
    return SearchSpace(genome, 1, "float32")
