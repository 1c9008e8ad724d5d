"""A search over layers on live models, from weights to the exported stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import CHOICE_TASK, demo_config, skill_task, write_tasks
from agentmerge.errors import ConfigError
from agentmerge.ledger import Ledger
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.session.replay import replay
from tests.merging.stack_cases import write_family


@pytest.fixture(scope="module")
def body(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), family.skills, n_items=120)
    made = demo_config(family, folder)
    made["genome"] |= {"layer_granularity": 4, "layers": 2}
    return made | {
        "tasks": [
            {"name": skill_task(family.skills[0]), "metric": "exact_match,none"},
            {"name": CHOICE_TASK, "metric": "acc,none"},
        ],
        "limit": 24,
        "task_search_path": [str(folder)],
        "budget": {"max_evaluations": 44},
        "search": {"seed": 5, "algorithm": "gradient", "sealed_share": 0.2},
        "worker": {"batch_size": 64, "options": {"threads": 1}},
    }


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_layers_are_searched_on_live_models(
    body: dict[str, Any], tmp_path: Path, method: str
) -> None:
    genome = body["genome"] | {"merge_method": method}
    config = SearchConfig.from_text(yaml.safe_dump(body | {"genome": genome}))
    row = driving.run(config, name="a", runs_dir=tmp_path)
    assert row.status == "done"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        candidates = ledger.candidates(row.id)
        texts = {c.recipe_hash: ledger.recipe(c.recipe_hash, row.id) for c in candidates}
        _, layers = dict.fromkeys(c.space for c in candidates)
        mine = [c for c in candidates if c.space == layers]
        assert {c.failure for c in candidates} == {""}
        asked = [c for c in mine if c.want == "gradient" and c.state == "scored"]
        assert asked
        assert all(c.gradient and any(c.gradient) for c in asked)
    depths = {_depth(Recipe.parse(texts[c.recipe_hash])) for c in mine}
    assert depths <= {4, 5, 6}
    assert max(depths) > 4
    answer = row.result["answer"]
    assert tuple(answer["candidate"]) in {(c.generation, c.slot) for c in candidates}
    assert (tmp_path / "a" / "best.yml").is_file()
    assert replay("a", runs_dir=tmp_path).identical


def _depth(recipe: Recipe) -> int:
    ranges = [piece.sources[0].layer_range or (0, 0) for piece in recipe.slices]
    return sum(end - start for start, end in ranges)


def test_check_says_what_live_stacks_cost(body: dict[str, Any]) -> None:
    prepared = prepare(SearchConfig.from_text(yaml.safe_dump(body)), weights=False)
    assert prepared.layers is not None
    assert (prepared.layers.dimensions, prepared.layers.deepest) == (16, 6)
    assert prepared.layers.cost_a_token == 1.5
    assert prepared.layers.scaled_bytes
    assert prepared.space.outputs == ("self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("olmo2", "its layers do not normalize what they read"),
        ("gemma2", "the layers of a gemma2 model are scaled by their norms"),
    ],
)
def test_models_whose_layers_cannot_be_scaled_are_a_fault(
    body: dict[str, Any], tmp_path: Path, kind: str, words: str
) -> None:
    paths = write_family(tmp_path, kind)
    genome = {"models": [str(p) for p in paths.values()], "merge_method": "linear", "layers": 2}
    config = SearchConfig.from_text(yaml.safe_dump(body | {"genome": genome}))
    with pytest.raises(ConfigError) as caught:
        prepare(config, weights=False, tasks=False)
    (fault,) = (f for f in caught.value.faults if f.startswith("genome.layers is not possible: "))
    assert words in fault
