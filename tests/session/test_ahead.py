"""Models that think while workers score: what they know, when they are asked, the same trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from agentmerge.config import SearchConfig
from agentmerge.errors import ConfigError
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.strategies.llm_evo import LlmEvo
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_agents import advised, adviser, key  # noqa: F401 (a fixture)
from tests.session.test_resume import events, kill_after
from tests.session.test_structure import mover


def ahead(server: ScriptedServer, **sections: dict) -> dict:
    return advised(server, agents={"ahead": True}, search={"population": 4}, **sections)


def test_they_are_asked_before_the_last_score_of_a_generation(tmp_path: Path) -> None:
    worker = {"worker": {"options": {"base": "base", "delay_s": 0.4}}}
    with ScriptedServer(adviser) as server:
        driving.run(config(**ahead(server, **worker)), name="a", runs_dir=tmp_path)
    log = events(tmp_path / "a" / "log.jsonl")
    later = max(e["generation"] for e in log if e["event"] == "candidate")
    assert later >= 2
    for generation in range(1, later):
        words = [i for i, e in enumerate(log) if e.get("role") and e["generation"] == generation]
        scores = [
            i for i, e in enumerate(log)
            if e["event"] == "candidate" and e["generation"] == generation
        ]  # fmt: skip
        assert len(words) >= 3
        assert max(words) < max(scores)


@pytest.mark.slow
def test_more_workers_and_kills_change_nothing(tmp_path: Path) -> None:
    """So what a generation showed meanwhile, more or less of it, was in no question."""
    with ScriptedServer(adviser) as server:
        sections = ahead(server, worker={"options": {"base": "base", "delay_s": 0.03}})
        driving.run(config(**sections), name="calm", runs_dir=tmp_path / "calm")
        path, runs, rng = tmp_path / "config.yml", tmp_path / "runs", random.Random(3)
        sections["worker"] = {"count": 3} | sections["worker"]
        path.write_text(config_text(**sections))
        log = runs / "rough" / "log.jsonl"
        process = command("run", path, "--name", "rough", "--runs-dir", runs, "-q")
        kills = 0
        while kills < 4 and kill_after(process, log, rng.randint(3, 12), rng.random() * 0.05):
            kills += 1
            process = command("resume", "rough", "--runs-dir", runs, "-q")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert kills == 4
        assert trace_of(runs, "rough") == trace_of(tmp_path / "calm", "calm")
    assert replay("calm", runs_dir=tmp_path / "calm").identical


def test_what_is_said_ahead_is_of_the_space_that_it_is_used_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move doubles the dimensions; then both spaces take turns. Words of one are none of the
    other's, and those of the space whose turn it is are heard."""
    used: list[tuple[int, int, int]] = []
    propose = LlmEvo.propose

    def seen(self: LlmEvo, space: Any, history: Any, guidance: Any, *rest: Any) -> Any:
        if guidance is not None and guidance.source == "model":
            generation = history[-1].generation
            used.append((generation, space.dimensions, len(guidance.mean or ())))
        return propose(self, space, history, guidance, *rest)

    monkeypatch.setattr(LlmEvo, "propose", seen)
    with ScriptedServer(mover(("granularity", "1"))) as server:
        sections = ahead(server, budget={"max_evaluations": 70})
        sections["search"] |= {"algorithm": "llm_evo", "sealed_share": 0.0}
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
    assert {mean for _, _, mean in used} >= {4, 8}, used
    assert all(mean in (0, dimensions) for _, dimensions, mean in used), used
    on_trial = [bool(mean) for _, dimensions, mean in used if dimensions == 8]
    assert sum(on_trial) > len(on_trial) / 2, used


def test_tools_wait_for_workers() -> None:
    with pytest.raises(ConfigError, match=r"agents.probes 2 is not possible with agents.ahead"):
        SearchConfig.from_text(config_text(agents={"llm": "openai:x", "ahead": True, "probes": 2}))
