"""The model card: metadata that the Hub's own library reads, and nothing of this machine in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.recipe import Recipe
from agentmerge.report.model_card import model_card, on_the_hub
from agentmerge.report.summary import best_recipe
from agentmerge.session import driving
from tests.report.conftest import CONFIG, search_family


def card_of(runs: Path, name: str) -> tuple[str, dict, str]:
    """(card, the run's final card, the answer's recipe)."""
    with Ledger(runs / driving.LEDGER) as ledger:
        row = ledger.run(name)
        found = best_recipe(ledger, row)
        assert row.result is not None
        return model_card(ledger, row, found), row.result, found["recipe"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


def test_the_hubs_library_reads_the_metadata(runs: Path) -> None:
    text, final, recipe = card_of(runs, "second")
    card = ModelCard(text)
    head = card.data.to_dict()
    assert head["tags"] == ["merge", "mergekit", "agentmerge"]
    assert head["library_name"] == "transformers"
    assert set(head["base_model"]) == set(Recipe.parse(recipe).models)
    results = {r.dataset_type: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    sealed = final["answer"]["sealed_tasks"]
    assert results == {task: ("acc", value) for task, value in sealed.items()}
    assert card.data.model_name == "second"


def test_it_says_how_it_was_found_and_what_it_is_worth(runs: Path) -> None:
    text, final, recipe = card_of(runs, "second")
    assert final["verdict"] in text
    assert f"{final['answer']['sealed_score']:.4f}" in text
    assert "Intervals are Wilson's" in text
    assert text.count(" to 0.") >= 2
    assert final["differences"]
    assert text.count("\nAgainst ") == len(final["differences"])
    assert "licences" in text
    assert "agentmerge branch ORIGIN --at 1 --as second" in text
    blocks = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    config, shown = blocks
    assert SearchConfig.from_text(config).genome.merge_method == "ties"
    assert Recipe.parse(shown).canonical(4).hash() == Recipe.parse(recipe).canonical(4).hash()


def test_nobodys_paths_are_published(tmp_path: Path) -> None:
    for name in ("north", "south", "east", "base"):
        (tmp_path / "models" / name).mkdir(parents=True)
    where = f"{tmp_path}/models/"
    text = CONFIG.replace("[north, south, east]", f"[{where}north, {where}south, {where}east]")
    text = text.replace("base_model: base", f"base_model: {where}base")
    text = text.replace("base: base", f"base: {where}base")
    driving.run(SearchConfig.from_text(text), name="a", runs_dir=tmp_path)
    card, _, _ = card_of(tmp_path, "a")
    assert str(tmp_path) not in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "- north, weights SHA-256" in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/model", True), ("gpt2", True), ("/models/a", False), ("a/b/c", False), (".", False)],
)
def test_what_can_be_a_hub_id(name: str, expected: bool) -> None:
    assert on_the_hub(name) is expected
