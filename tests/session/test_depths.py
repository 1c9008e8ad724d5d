"""What the depth of an answer buys: its table, and how deep the answer has to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.contracts.operators import CHEAP, SHALLOWER
from agentmerge.ledger import Candidate
from agentmerge.ledger.folder import opened
from agentmerge.merging.export import export_checkpoint
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read
from agentmerge.report.html import write_report
from agentmerge.report.model_card import model_card
from agentmerge.report.summary import best_recipe, depth_rows
from agentmerge.session import driving
from agentmerge.session.export import export_run
from agentmerge.session.replay import replay
from agentmerge.workers.fake import FakeWorker
from tests.evaluation import tiny
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_layers import depth, layered, recipes_of
from tests.session.test_resume import kill_after
from tests.session.test_structure import moves_of

#: Enough items, sealed ones too, for a deep stack to be ahead of its merge beyond the noise.
DEEP: dict[str, Any] = {
    "search": {"sealed_share": 0.5},
    "budget": {"max_evaluations": 120},
    "limit": 200,
    "worker": {"options": {"base": "base", "documents": 400}},
}


def searched(tmp_path: Path, name: str = "a", **more: Any) -> tuple[Any, list[Candidate]]:
    row = driving.run(config(**layered(4, **(DEEP | more))), name=name, runs_dir=tmp_path)
    return row, moves_of(tmp_path, name)[1]


def test_a_deep_answer_says_what_each_layer_buys(tmp_path: Path, capsys: Any) -> None:
    row, candidates = searched(tmp_path)
    last = candidates[-1].generation
    added = [c for c in candidates if c.operator == SHALLOWER]
    assert added
    assert {c.generation for c in added} == {last}
    assert sum(c.cost for c in candidates) <= 120
    rows = row.card.depths
    depths = [found.layers for found in rows]
    assert depths == sorted(set(depths))
    assert depths[0] == 4
    assert len(depths) >= len(added)
    assert all(found.score is not None and found.sealed_score is not None for found in rows)
    assert rows[0].ahead is None
    assert all(found.ahead is not None for found in rows[1:])
    # the merge underneath is the one that the search of layers began with
    (opening,), _ = moves_of(tmp_path, "a")
    assert opening.move.value == ".".join(map(str, rows[0].candidate))
    answer = row.card.answer
    assert tuple(answer.candidate) in {tuple(found.candidate) for found in rows}
    assert replay("a", runs_dir=tmp_path).identical
    assert run_app(["show", "a", "--runs-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ahead of the first" in shown
    assert "(the answer)" in shown


def test_each_row_lacks_the_weakest_layer_of_the_next(tmp_path: Path) -> None:
    row, candidates = searched(tmp_path)
    by_place = {(c.generation, c.slot): c for c in candidates}
    stacks = [by_place[tuple(found.candidate)] for found in row.card.depths[1:]]
    for lower, higher in pairwise(stacks):
        pairs = zip(lower.vector or (), higher.vector or (), strict=True)
        assert sum(one != other for one, other in pairs) in (1, 2), "one layer's two scales"


def test_killed_in_the_middle_of_the_table_it_ends_the_same(tmp_path: Path) -> None:
    options = DEEP["worker"]["options"] | {"delay_s": 0.02}
    sections = layered(4, **(DEEP | {"worker": {"options": options}}))
    path = tmp_path / "config.yml"
    path.write_text(config_text(**sections))
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    driving.run(config(**sections), name="a", runs_dir=calm)
    asked = [c for c in moves_of(calm, "a")[1] if c.twin is None]
    before = sum(c.operator != SHALLOWER for c in asked)
    assert before < len(asked)
    log = torn / "a" / "log.jsonl"
    kill_after(command("run", path, "--name", "a", "--runs-dir", torn), log, before + 1, 0.01)
    driving.resume("a", runs_dir=torn)
    assert trace_of(torn, "a") == trace_of(calm, "a")


def test_a_worker_lost_at_a_depth_is_said_and_resume_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, load, lost = FakeWorker.score, FakeWorker.load, list[str]()

    def loading(self: Any, recipe: Recipe) -> Any:
        self.own = recipe.hash()
        return load(self, recipe)

    def dying(self: Any, items: Any) -> Any:
        if self.own in lost and items[0].index >= DEEP["limit"] // 2:
            raise RuntimeError("no kernel image")
        return score(self, items)

    monkeypatch.setattr(FakeWorker, "load", loading)
    monkeypatch.setattr(FakeWorker, "score", dying)
    sound = searched(tmp_path / "sound")[0].card
    own = [list(found.candidate) for found in sound.depths]
    other = next(i for i, c in enumerate(own[1:], 1) if c != list(sound.answer.candidate))
    with opened(tmp_path / "sound") as ledger:
        text = ledger.recipe(sound.depths[other].recipe_hash, ledger.run("a").id)
    lost.append(Recipe.parse(text).hash())
    card = searched(tmp_path)[0].card
    assert "no kernel image" in card.lost
    assert "no kernel image" in card.depths[other].sealed_failure
    assert card.depths[other].ahead is None
    lost.clear()
    assert driving.resume("a", runs_dir=tmp_path).card == sound


def test_another_depth_of_the_table_is_exported(tmp_path: Path, capsys: Any) -> None:
    row, _ = searched(tmp_path)
    with opened(tmp_path) as ledger:
        for found in row.card.depths:
            recipe = best_recipe(ledger, row, found.layers)
            assert recipe["recipe_hash"] == found.recipe_hash
    assert run_app(["export", "a", "--to", str(tmp_path / "x"), "--runs-dir", str(tmp_path),
                    "--layers", "3"]) == 2  # fmt: skip
    assert "no stack of 3 layers; it has 4," in capsys.readouterr().err


def test_a_stack_within_the_noise_is_not_the_answer(tmp_path: Path) -> None:
    """Twenty items tell no layer's gain from luck: the merge under the stack is what is handed out,
    or a cheap rival where that is not ahead either."""
    row, candidates = searched(tmp_path, limit=20, budget={"max_evaluations": 70})
    answer = row.card.answer
    (made,) = [c for c in candidates if [c.generation, c.slot] == list(answer.candidate)]
    by_space = recipes_of(tmp_path, "a", made.space)
    own = [c for c in candidates if c.space == made.space]
    assert depth(by_space[own.index(made)]) == 4 or made.operator in CHEAP


#: A stack of the models' depth, whose middle layers change places.
SWAPPED = """
merge_method: passthrough
slices:
- sources: [{model: north, layer_range: [0, 1]}]
- sources: [{model: north, layer_range: [2, 3]}]
- sources: [{model: south, layer_range: [1, 2]}]
- sources: [{model: north, layer_range: [3, 4]}]
"""
PATH = {"layers": {"most": 1, "path": True, "insert": ["merge"]}}
SKIP = {"layers": {"most": 0, "skip": True, "insert": ["merge"]}}
NOTHING: dict[str, Any] = {}


def gains(
    monkeypatch: pytest.MonkeyPatch, of: Callable[[Recipe], bool], search: float, sealed: float
) -> None:
    """Merges that are ``of`` answer such shares of the search items and of the sealed ones."""
    score, load = FakeWorker.score, FakeWorker.load

    def loading(self: Any, recipe: Recipe) -> Any:
        self.gains = of(recipe.canonical(4))
        return load(self, recipe)

    def scoring(self: Any, items: Any) -> Any:
        found = score(self, items)
        if not self.gains:
            return found
        shares = [sealed if item.index >= DEEP["limit"] else search for item in items]
        right = [
            int(item.key[:4], 16) / 0xFFFF <= share
            for item, share in zip(items, shares, strict=True)
        ]
        return [
            replace(one, value=float(yes), margin=1.0 if yes else -1.0)
            for one, yes in zip(found, right, strict=True)
        ]

    monkeypatch.setattr(FakeWorker, "load", loading)
    monkeypatch.setattr(FakeWorker, "score", scoring)


def shaped(least: int, most: int, method: str = "linear") -> Callable[[Recipe], bool]:
    """Stacks of so many layers, by that method."""

    def of(recipe: Recipe) -> bool:
        layers = layers_read(recipe)
        own = layers == (0, 1, 2, 3)
        return recipe.merge_method == method and not own and least <= len(layers) <= most

    return of


def scaled(recipe: Recipe) -> bool:
    """The models' layers in their places, and some at a scale."""
    return layers_read(recipe) == (0, 1, 2, 3) and "self_attn" in recipe.to_yaml()


@pytest.mark.parametrize(
    ("of", "genome", "algorithm", "init"),
    [
        pytest.param(shaped(5, 8), NOTHING, "gradient", False, id="deeper"),
        pytest.param(shaped(2, 4), PATH, "random", False, id="shorter"),
        pytest.param(scaled, SKIP, "random", False, id="scaled"),
        pytest.param(shaped(6, 6, "passthrough"), NOTHING, "gradient", False, id="cheap"),
        pytest.param(shaped(4, 4), {"layers": None}, "random", True, id="init"),
    ],
)
def test_a_stack_that_sealed_items_do_not_confirm_is_not_the_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of: Any,
    genome: Any,
    algorithm: str,
    init: bool,
) -> None:
    """It is ahead of the other cheap rivals there, and not of what weights found."""
    (tmp_path / "swapped.yml").write_text(SWAPPED)
    sections = layered(
        4, algorithm, **(DEEP | {"budget": {"max_evaluations": 100 if of is scaled else 60}})
    )
    sections["genome"] |= genome
    sections["search"] |= {"init": [str(tmp_path / "swapped.yml")]} if init else {}
    gains(monkeypatch, of, 1.0, 0.85)
    row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    candidates = moves_of(tmp_path, "a")[1]
    best = min((c for c in candidates if c.score is not None), key=lambda c: c.rank)
    with opened(tmp_path) as ledger:
        assert of(Recipe.parse(ledger.recipe(best.recipe_hash, row.id)))
        answer = Recipe.parse(ledger.recipe(row.card.answer.recipe_hash, row.id))
        exported = best_recipe(ledger, row, 4)["recipe_hash"]
    assert layers_read(answer) == (0, 1, 2, 3)
    assert exported == row.card.answer.recipe_hash, "and no other stack of as many layers"
    assert not of(answer)
    assert row.card.answer.operator not in CHEAP
    assert any("that merge is chosen" in note for note in row.card.notes)
    under, *_, stack = row.card.depths
    assert under.recipe_hash == row.card.answer.recipe_hash
    assert stack.ahead is not None
    assert stack.ahead[1] <= 0
    assert replay("a", runs_dir=tmp_path).identical


def test_of_stacks_that_search_items_cannot_tell_apart_the_shallowest_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains(monkeypatch, shaped(5, 8), 1.0, 1.0)
    row, _ = searched(tmp_path, budget={"max_evaluations": 60})
    (note,) = [note for note in row.card.notes if "no worse than" in note]
    depths = [found.layers for found in row.card.depths]
    assert note.startswith(f"a stack of {depths[1]} layers is no worse than")
    assert f"a stack of {depths[-1]}, beyond the noise" in note
    assert row.card.answer.recipe_hash == row.card.depths[1].recipe_hash
    assert any("worth" in note for note in row.card.notes)


def test_races_leave_the_tables_rungs_alone(tmp_path: Path) -> None:
    """They are weaker than the stack that they are asked for."""
    sections = layered(4, "one_plus_one", **DEEP)
    sections["genome"]["layers"] = {"path": True, "repeats": 2}
    sections["search"]["racing"] = True
    driving.run(config(**sections), name="a", runs_dir=tmp_path)
    candidates = moves_of(tmp_path, "a")[1]
    rungs = [c for c in candidates if c.operator == SHALLOWER]
    assert rungs
    assert {c.state for c in rungs} == {"scored"}
    assert any(c.state == "stopped" for c in candidates), "others are raced"


def test_a_merge_that_breaks_the_constraints_takes_no_stacks_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights gain on one task what they lose on the other; only stacks keep both."""
    score, load = FakeWorker.score, FakeWorker.load
    shares = {
        "base": (0.4, 0.4), "north": (0.8, 0.4), "south": (0.4, 0.8),
        "both": (0.99, 0.75), "stack": (0.83, 0.83),
    }  # fmt: skip

    def loading(self: Any, recipe: Recipe) -> Any:
        form = recipe.canonical(4)
        weights = {s.model: dict(s.parameters).get("weight") for s in form.slices[0].sources}
        live = [
            model
            for model, weight in weights.items()
            if model != "base" and (weight is None or any(any(v) for _, v in weight.entries))
        ]
        self.of = "both" if len(live) > 1 else [*live, "base"][0]
        if layers_read(form) != (0, 1, 2, 3):
            self.of = "stack" if form.merge_method == "linear" else live[0]
        return load(self, recipe)

    def scoring(self: Any, items: Any) -> Any:
        right = [
            int(item.key[:4], 16) / 0xFFFF <= shares[self.of][item.task != "one"] for item in items
        ]
        return [
            replace(one, value=float(yes), margin=1.0 if yes else -1.0)
            for one, yes in zip(score(self, items), right, strict=True)
        ]

    monkeypatch.setattr(FakeWorker, "load", loading)
    monkeypatch.setattr(FakeWorker, "score", scoring)
    search = {"sealed_share": 0.5, "constraints": [{"task": "*", "max_drop": 0.0}]}
    row, candidates = searched(tmp_path, search=search, budget={"max_evaluations": 80})
    kept = [c for c in candidates if c.score is not None and not c.violation]
    assert any(c.operator not in CHEAP for c in kept)
    (answer,) = [c for c in candidates if [c.generation, c.slot] == [*row.card.answer.candidate]]
    assert answer.violation == 0
    assert not any("no candidate kept" in note for note in row.card.notes)


def test_without_layers_nothing_changes(tmp_path: Path) -> None:
    row = driving.run(config(), name="a", runs_dir=tmp_path)
    assert "depths" not in (row.result or {})
    assert not row.card.depths
    with opened(tmp_path) as ledger, pytest.raises(Exception, match="its answer is no stack"):
        best_recipe(ledger, row, 6)
    assert json.dumps(row.result)


def test_the_report_and_the_model_card_have_the_table(tmp_path: Path) -> None:
    row, _ = searched(tmp_path)
    with opened(tmp_path) as ledger:
        page = write_report(ledger, ["a"], tmp_path / "report.html").read_text()
        first = best_recipe(ledger, row, row.card.depths[0].layers)
        card = model_card(ledger, row, first)
    assert "What depth buys" in page
    assert '"run0-depths"' in page
    assert "| **4**, this model |" in card
    sealed = row.card.depths[0].sealed_tasks["one"]
    assert f"{sealed:.4f}".rstrip("0").rstrip(".") in card.partition("## Parents")[0]
    assert "Against" not in card, "differences are the answer's"


def test_a_stack_on_real_models_is_exported_at_every_depth(tmp_path: Path) -> None:
    """A perplexity beside an accuracy, scored live, as the exported checkpoint scores."""
    family = tiny.write_family(tmp_path / "family")
    names = {str(path): path for path in family.values()}
    stack = [(family["b"], 0, 1.0), (family["c"], 0, 0.7), (family["b"], 1, 1.0)]
    slices = [
        {
            "sources": [
                {
                    "model": str(model),
                    "layer_range": [layer, layer + 1],
                    "parameters": {
                        "scale": [
                            {"filter": "o_proj", "value": scale},
                            {"filter": "down_proj", "value": scale},
                            {"value": 1.0},
                        ]
                    },
                }
            ]
        }
        for model, layer, scale in stack
    ]
    recipe = Recipe.parse({"merge_method": "passthrough", "slices": slices})
    export_checkpoint(recipe, names, tmp_path / "oracle", template_model=str(family["b"]))
    tasks = tiny.write_tasks(tmp_path / "tasks", tmp_path / "oracle", count=40)
    body = {
        "genome": {
            "models": [str(family["b"]), str(family["c"])],
            "base_model": str(family["base"]),
            "merge_method": "task_arithmetic",
            "layer_granularity": 0,
            "normalize": False,
            "layers": 2,
        },
        "tasks": [
            {"name": "tiny_cloze", "metric": "perplexity,none"},
            {"name": "tiny_choice", "metric": "acc,none"},
        ],
        "task_search_path": [str(tasks)],
        "search": {"algorithm": "gradient", "seed": 1, "sealed_share": 0.5},
        "budget": {"max_evaluations": 60},
        "worker": {
            "kind": "hf",
            "batch_size": 32,
            "lm_eval_args": {"apply_chat_template": False},
            "options": {"threads": 1},
        },
    }
    settings = SearchConfig.from_text(yaml.safe_dump(body))
    row = driving.run(settings, name="a", runs_dir=tmp_path / "runs")
    rows = row.card.depths
    assert len(rows) > 1
    with opened(tmp_path / "runs") as ledger:
        told = depth_rows(ledger, row)
    sizes = [found["parameters"] for found in told]
    assert all(sizes)
    assert sizes == sorted(set(sizes))
    for found in rows:
        to = tmp_path / f"export-{found.layers}"
        report = export_run("a", to, runs_dir=tmp_path / "runs", layers=found.layers)
        assert report["equal"]
        assert report["score"] == found.score
        config = json.loads((to / "config.json").read_text())
        assert config["num_hidden_layers"] == found.layers
