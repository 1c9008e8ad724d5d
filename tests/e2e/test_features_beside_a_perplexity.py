"""Every feature once on a live model, with an objective that is no easy one.

An accuracy with margins beside a text's perplexity: lower is better, no mean over items, no margin,
on another scale. One runs directory, so that a merge is scored once for all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.strategy import GRADIENT_COST
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import CHOICE_TASK, demo_config, write_task, write_tasks
from agentmerge.ledger import Ledger, RunRow
from agentmerge.session import driving
from agentmerge.session.replay import replay

TEXT = "text_perplexity"
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "word_perplexity"}],
}
BUDGET = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def body(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), family.skills, n_items=120)
    words = ["s:abcde=bcdef", "o:dbeca=abcde", "s:hgfab=ihgbc", "o:gfedh=defgh"]
    texts = [{"text": " ".join(words[n % 4 :] + words[: 1 + n % 3])} for n in range(40)]
    write_task(folder, TEXT, texts, ROLLING)
    return demo_config(family, folder) | {
        "tasks": [
            {"name": CHOICE_TASK, "metric": "acc,none", "weight": 1.0},
            {"name": TEXT, "metric": "word_perplexity,none", "weight": 0.001},
        ],
        "limit": 20,
        "task_search_path": [str(folder)],
        "budget": {"max_evaluations": BUDGET},
        "search": {"seed": 5},
        "worker": {"batch_size": 64, "options": {"threads": 1}},
    }


def config_of(body: dict[str, Any], **changes: Any) -> SearchConfig:
    whole = dict(body)
    for key, value in changes.items():
        whole[key] = whole[key] | value if isinstance(value, dict) else value
    return SearchConfig.from_text(yaml.safe_dump(whole))


def judged(runs: Path, row: RunRow, most: float = BUDGET) -> dict[str, Any]:
    """What holds for the end of any search; its card."""
    assert row.status == "done"
    card = row.result
    with Ledger(runs / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
        assert sum(c.cost for c in found if not c.prior) <= most
    scored = [c for c in found if c.score is not None]
    for candidate in scored:
        tasks = dict(candidate.tasks)
        assert candidate.score == pytest.approx(tasks[CHOICE_TASK] - 0.001 * tasks[TEXT])
    if card["sealed"]:
        assert math.isfinite(card["answer"]["sealed_score"])
    else:
        assert any("no sealed items" in note for note in card["notes"])
    assert "no cheap rival to compare with" not in card["verdict"]
    assert all(d["low"] < d["high"] for d in card["differences"])
    answer = tuple(card["answer"]["candidate"])
    assert answer in {(c.generation, c.slot) for c in scored}
    return card


SEARCHES: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, a perplexity alone": {
        "tasks": [{"name": TEXT, "metric": "word_perplexity,none", "weight": 0.001}]
    },
    "cma_es": {"search": {"algorithm": "cma_es", "population": 4}},
    "tpe": {"search": {"algorithm": "tpe"}},
    "llm_evo by rules": {"search": {"algorithm": "llm_evo", "population": 3}},
    "racing": {"search": {"algorithm": "one_plus_one", "racing": True}},
    "structure": {"search": {"structure": "free"}, "genome": {"layer_granularity": 2}},
    "gradients": {"search": {"algorithm": "gradient"}},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_ends_with_an_honest_answer_and_replays(
    body: dict[str, Any], runs: Path, name: str
) -> None:
    config = config_of(body, **SEARCHES[name])
    row = driving.run(config, name=name.replace(" ", "-").replace(",", ""), runs_dir=runs)
    assert row.status == "done"
    if "alone" not in name:
        judged(runs, row, BUDGET + GRADIENT_COST * (name == "gradients"))
    again = replay(row.name, runs_dir=runs)
    assert again.identical, again


def test_constraints_hold_a_perplexity_down(body: dict[str, Any], runs: Path) -> None:
    constraints = [{"task": TEXT, "max_drop": 0.5}]
    row = driving.run(
        config_of(body, search={"constraints": constraints}), name="constrained", runs_dir=runs
    )
    card = judged(runs, row)
    with Ledger(runs / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    best = min(dict(c.tasks)[TEXT] for c in found if c.operator == "parent")
    answer = next(c for c in found if [c.generation, c.slot] == card["answer"]["candidate"])
    assert dict(answer.tasks)[TEXT] <= best + 0.5


def test_resume_and_branch_go_on(body: dict[str, Any], runs: Path) -> None:
    short = config_of(body, budget={"max_evaluations": 12}, search={"algorithm": "margins"})
    driving.run(short, name="short", runs_dir=runs)
    row = driving.resume("short", runs_dir=runs, overrides={"budget.max_evaluations": BUDGET})
    judged(runs, row)
    whole = config_of(body, search={"algorithm": "margins"})
    driving.run(whole, name="whole", runs_dir=runs)
    with Ledger(runs / driving.LEDGER) as ledger:
        one, other = (ledger.candidates(ledger.run(name).id) for name in ("short", "whole"))
    assert [c.recipe_hash for c in one] == [c.recipe_hash for c in other]
    wider = driving.branch(
        "short", at=1, name="wider", runs_dir=runs,
        overrides={"genome.filters": ["self_attn", "mlp"]},
    )  # fmt: skip
    judged(runs, wider)
    fewer = driving.branch("short", at=1, name="fewer", runs_dir=runs, overrides={"limit": 14})
    judged(runs, fewer)
