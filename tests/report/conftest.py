"""A small family of searches on the fake worker, for everything that reads finished searches."""

from __future__ import annotations

from pathlib import Path

from agentmerge.config import SearchConfig
from agentmerge.session import driving

CONFIG = """\
genome:
  models: [north, south, east]
  base_model: base
  merge_method: ties
  layer_granularity: 2
  filters: [self_attn]
tasks:
  - {name: one, metric: "acc,none"}
  - {name: two, metric: "acc,none", weight: 0.5}
limit: 60
search: {algorithm: cma_es, seed: 3, population: 6}
worker: {kind: fake, options: {num_layers: 4, base: base, fail_when: "max_weight>0.99"}}
budget: {max_evaluations: 40}
"""


def search_family(runs: Path) -> None:
    """Search "first", and "second", which left it at generation 1 with another algorithm."""
    config = SearchConfig.from_text(CONFIG)
    driving.run(config, name="first", runs_dir=runs)
    other = {"search.algorithm": "random", "budget.max_evaluations": 30}
    driving.branch("first", at=1, name="second", runs_dir=runs, overrides=other)
