"""The plugin is judged as what ships with agentmerge is: by the suites of the contracts."""

from __future__ import annotations

import pytest

from agentmerge.contracts import GenomeConfig, Space, Strategy, Worker, load_plugin
from agentmerge.testing import (
    HostSuite,
    MethodSuite,
    ModelWorkerSuite,
    SpaceSuite,
    StrategySuite,
    space_of,
)


class TestTimedWorker(ModelWorkerSuite):
    kind = "timed_hf"

    def test_every_swap_is_timed(self, worker: Worker, first: object) -> None:
        assert worker.swaps_s
        assert min(worker.swaps_s) > 0


class TestPolite(HostSuite):
    name = "polite"


class TestCapped(MethodSuite):
    name = "capped"


class TestHalfway(StrategySuite):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return load_plugin("agentmerge.strategies", "halfway")


class TestSeesaw(SpaceSuite):
    @pytest.fixture(params=(0, 2))
    def space(self, request: pytest.FixtureRequest) -> Space:
        return space_of(
            GenomeConfig(
                models=("b", "c"),
                base_model="a",
                merge_method="task_arithmetic",
                layer_granularity=request.param,
                normalize=False,
                space="seesaw",
            ),
            num_layers=4,
        )
