"""Searches of objectives that are no accuracy: which way they go, and on what scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.ledger import Candidate, Ledger
from agentmerge.session import driving
from tests.evaluation import tiny
from tests.session.conftest import OBJECTIVES, config

RIVALS = 10


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """A family, and tasks whose gold answers are half what one of its experts says."""
    root = tmp_path_factory.mktemp("family")
    family = tiny.write_family(root)
    return family, tiny.write_tasks(root / "tasks", family["b"], count=40)


def searched(
    parts: tuple[dict[str, Path], Path], runs: Path, *tasks: dict, budget: int = RIVALS + 9
) -> list[Candidate]:
    family, folder = parts
    body = {
        "genome": {
            "models": [str(family["b"]), str(family["c"])],
            "base_model": str(family["base"]),
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
            "normalize": False,
        },
        "tasks": list(tasks),
        "task_search_path": [str(folder)],
        "sealed_share": 0.0,
        "search": {"algorithm": "auto", "seed": 1},
        "budget": {"max_evaluations": budget},
        "worker": {
            "kind": "hf",
            "batch_size": 32,
            "lm_eval_args": {"apply_chat_template": False},
            "options": {"threads": 1},
        },
    }
    config = SearchConfig.from_text(yaml.safe_dump(body))
    row = driving.run(config, name="a", runs_dir=runs)
    assert row.status == "done"
    with Ledger(runs / driving.LEDGER) as ledger:
        asked, texts = ledger.item_keys(row.id, "search"), ledger.texts(row.id)
        assert {task: [*said] for task, said in texts.items()} == asked, "what each item says"
        return ledger.candidates(row.id)


PERPLEXITY = {"name": "tiny_cloze", "metric": "perplexity,none"}


@pytest.mark.parametrize(
    "others", [(), ({"name": "tiny_choice", "metric": "acc,none"},)], ids=["alone", "beside"]
)
def test_a_perplexity_of_many_decades_is_searched_the_right_way(
    parts: tuple[dict[str, Path], Path], tmp_path: Path, others: tuple[dict, ...]
) -> None:
    found = searched(parts, tmp_path, PERPLEXITY, *others)
    told = {False: [], True: []}
    for candidate in found:
        told[candidate.generation > 0].append(dict(candidate.tasks)["tiny_cloze"])
    assert max(told[False]) > 500 * min(told[False]), "the family leaves it no decades"
    assert min(told[True]) < min(told[False])
    middle = sorted(told[True])[len(told[True]) // 2]
    assert middle < 2 * min(told[False]), "most candidates are among the better"


@pytest.mark.parametrize("kind", ["perplexity", "loss"])
def test_the_default_search_gains_and_keeps_a_constraint_on_what_should_be_low(
    tmp_path: Path, kind: str
) -> None:
    """Candidates fail in places; a text's perplexity is no mean, a loss has no margins."""
    sections = {key: value for key, value in OBJECTIVES[kind].items() if key != "worker"}
    options = OBJECTIVES[kind]["worker"]["options"] | {"fail_when": "mean_weight>0.75"}
    search = {
        "algorithm": "auto",
        "population": 1,
        "constraints": [{"task": "two", "max_drop": 0.05}],
    }
    row = driving.run(
        config(
            search=search, budget={"max_evaluations": 26}, worker={"options": options}, **sections
        ),
        name="a",
        runs_dir=tmp_path,
    )
    assert row.status == "done"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    rivals = [c for c in found if c.generation == 0]
    own = [c for c in found if c.generation > 0]
    kept = [c for c in own if c.score is not None and not c.violation]
    assert any(c.failure for c in rivals), "nothing failed"
    assert sum(c.score is None for c in own) <= len(own) / 4
    assert len(kept) > 0.6 * len(own)
    cheap = [c.score for c in rivals if c.score is not None and not c.violation]
    assert max(c.score for c in kept) > max(cheap)
