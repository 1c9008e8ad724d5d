"""A small search history that every agent test can read."""

import pytest

from agentmerge.agents.view import HistoryView, TaskView
from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Observation
from agentmerge.space.grouped import SearchSpace


@pytest.fixture(autouse=True)
def _no_providers(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="observe")
def _observe():
    return observe


@pytest.fixture
def space():
    genome = GenomeConfig(
        models=("org/expert-shift", "/models/expert-sort"),
        merge_method="task_arithmetic",
        base_model="org/base",
        layer_granularity=2,
    )
    return SearchSpace(genome, num_layers=4, dtype="float32")


def observe(generation, slot, vector, score, operator="llm_evo", label="", failure=""):
    tasks = () if score is None else (("shift", score), ("perplexity", 10.0 - score))
    return Observation(
        generation, slot, vector, operator, score, tasks, label=label, failure=failure
    )


@pytest.fixture
def make_view(space):
    def make(entries, **changes):
        defaults = {
            "space": space,
            "tasks": (
                TaskView("shift", 1.0, "exact_match,none", True),
                TaskView("perplexity", -0.1, "word_perplexity,none", False),
            ),
            "entries": tuple(entries),
            "sigma": 0.2,
            "sigma_low": 0.05,
            "sigma_high": 0.2,
            "improved_last": True,
            "budget_left": 60,
        }
        return HistoryView(**{**defaults, **changes})

    return make


@pytest.fixture
def entries():
    return [
        observe(0, 0, (2 / 3, 0.0, 2 / 3, 0.0), 0.40, "parent", "expert-shift"),
        observe(0, 1, (0.0, 2 / 3, 0.0, 2 / 3), 0.30, "parent", "expert-sort"),
        observe(0, 2, (0.5, 0.5, 0.5, 0.5), 0.35, "uniform", "0.5"),
        observe(0, 3, (0.10, 0.2, 0.3, 0.4), 0.10, "random"),
        observe(0, 4, (0.29, 0.2, 0.3, 0.4), 0.25, "random"),
        observe(1, 0, (0.60, 0.2, 0.3, 0.4), 0.60),
        observe(1, 1, (0.80, 0.2, 0.3, 0.4), 0.80),
        observe(1, 2, (0.9, 0.9, 0.9, 0.9), None, failure="weights cancel\x1b[31m in group 1"),
    ]


@pytest.fixture
def view(make_view, entries):
    return make_view(entries)
