"""A search over layers: it opens once weights have had their share, and goes on exactly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.contracts.advice import StructuralMove
from agentmerge.contracts.strategy import Observation
from agentmerge.errors import ConfigError
from agentmerge.ledger import Ledger
from agentmerge.preflight import prepare
from agentmerge.recipe import Recipe
from agentmerge.search import structure
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.strategies.gradient import GradientSteps
from agentmerge.testing.scripted import ScriptedServer
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.kinds import refuse_stack
from tests.reading import Told
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_agents import advised
from tests.session.test_faults import role_of
from tests.session.test_resume import kill_after
from tests.session.test_structure import mover, moves_of

FORMS: dict[str, Any] = {"beside": 4, "path": {"path": True, "insert": "north"}}


def layered(layers: Any = 4, algorithm: str = "gradient", **sections: Any) -> dict[str, Any]:
    search = {"algorithm": algorithm, "sealed_share": 0.0, "population": None}
    genome = {"layers": layers, "layer_granularity": 0}
    return {
        "genome": genome,
        "search": search | sections.pop("search", {}),
        "budget": {"max_evaluations": 56},
    } | sections


def recipes_of(runs_dir: Path, name: str, space: str) -> list[Recipe]:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        row = ledger.run(name)
        known = [c for c in ledger.candidates(row.id) if c.space == space]
        found = [c for c in known if c.operator != "stack"]  # a cheap rival, which is deep
        return [Recipe.parse(ledger.recipe(c.recipe_hash, row.id)) for c in found]


def depth(recipe: Recipe) -> int:
    return sum(end - start for start, end in (p.sources[0].layer_range for p in recipe.slices))


STRATEGIES = ["gradient", "cma_es", "tpe", "one_plus_one", "random", "sobol", "llm_evo", "null_llm"]


@pytest.mark.parametrize(
    ("algorithm", "form"),
    [*((name, "beside") for name in STRATEGIES), ("gradient", "path"), ("cma_es", "path")],
)
def test_every_strategy_searches_layers(tmp_path: Path, algorithm: str, form: str) -> None:
    settings = config(**layered(FORMS[form], algorithm))
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    assert (row.status, opening.move.change, opening.refusal) == ("done", "layers", "")
    weights, layers = dict.fromkeys(c.space for c in candidates)
    assert min(c.generation for c in candidates if c.space == layers) == opening.generation + 1
    assert {c.failure for c in candidates} == {""}
    depths = [depth(recipe) for recipe in recipes_of(tmp_path, "a", layers)]
    assert len(depths) >= 3
    assert 4 < max(depths) <= 8 if form == "beside" else 2 <= max(depths) <= 8
    assert {depth(recipe) for recipe in recipes_of(tmp_path, "a", weights)} == {4}
    assert replay("a", runs_dir=tmp_path).identical


@pytest.mark.parametrize("algorithm", ["auto", "margins"])
def test_strategies_that_model_items_search_layers(tmp_path: Path, algorithm: str) -> None:
    sections = layered(4, algorithm, budget={"max_evaluations": 44})
    row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    assert (row.status, opening.refusal) == ("done", "")
    assert len({c.space for c in candidates}) == 2


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "linear"])
def test_a_merge_by_any_method_gets_layers(tmp_path: Path, method: str) -> None:
    """What no linear merge says is merged first, under a name."""
    sections = layered({"most": 2, "skip": True, "insert": ["merge", "experts"]})
    sections["genome"]["merge_method"] = method
    driving.run(config(**sections), name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    _, layers = dict.fromkeys(c.space for c in candidates)
    assert opening.refusal == ""
    assert {c.failure for c in candidates} == {""}
    mine = [c for c in candidates if c.space == layers]
    assert any(c.gradient for c in mine)
    stacks = recipes_of(tmp_path, "a", layers)[1:]
    assert {r.merge_method for r in stacks} == {"linear"}
    assert replay("a", runs_dir=tmp_path).identical


def test_as_many_layers_as_there_are_leave_a_budget_to_search_them(tmp_path: Path) -> None:
    """What is kept back for the table of depths is for depths that there are."""
    row = driving.run(config(**layered(99)), name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    assert (row.status, opening.refusal) == ("done", "")
    _, layers = dict.fromkeys(c.space for c in candidates)
    assert sum(c.space == layers for c in candidates) >= 3
    assert max(depth(recipe) for recipe in recipes_of(tmp_path, "a", layers)) <= 12


@pytest.mark.parametrize(("rung", "evaluations"), [("2", 44), ("3", 70)])
def test_a_finer_space_that_cannot_open_does_not_keep_layers_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str, evaluations: int
) -> None:
    """Which is wanted before them: too little is left for it, or it was refused."""
    monkeypatch.setattr(structure, "_worth_refining", lambda *_: True)
    monkeypatch.setattr(structure, "finer", lambda _: StructuralMove("granularity", rung))
    sections = layered(algorithm="cma_es", search={"structure": "free"})
    sections["budget"] = {"max_evaluations": evaluations}
    driving.run(config(**sections), name="a", runs_dir=tmp_path)
    *refused, opening = moves_of(tmp_path, "a")[0]
    assert [o.move.change for o in refused] == ([] if rung == "2" else ["granularity"])
    assert all(o.refusal for o in refused)
    assert (opening.move.change, opening.refusal) == ("layers", "")


@pytest.mark.parametrize("evaluations", [40, 32])
def test_a_small_budget_opens_layers_or_says_that_it_did_not(
    tmp_path: Path, evaluations: int
) -> None:
    """In generations of eight, half of forty is spent when too little is left for layers."""
    sections = layered(algorithm="cma_es", budget={"max_evaluations": evaluations})
    sections["search"]["population"] = 8
    row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    moves = [(o.move.change, o.refusal) for o in moves_of(tmp_path, "a")[0]]
    notes = [note for note in row.card.notes if "no layers were searched" in note]
    assert moves == ([("layers", "")] if evaluations == 40 else [])
    assert len(notes) == (evaluations != 40)
    if notes:
        least = int(re.search(r"with (\d+) more", notes[0]).group(1))
        more = {"budget.max_evaluations": evaluations + least}
        driving.resume("a", runs_dir=tmp_path, overrides=more)
        assert [o.move.change for o in moves_of(tmp_path, "a")[0]] == ["layers"]
        assert replay("a", runs_dir=tmp_path).identical


def test_it_keeps_the_layers_of_the_best_so_far(tmp_path: Path) -> None:
    driving.run(config(**layered()), name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    before = [c for c in candidates if c.generation <= opening.generation]
    best = min(before, key=lambda c: c.rank)
    assert opening.move.value == f"{best.generation}.{best.slot}"
    _, layers = dict.fromkeys(c.space for c in candidates)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        under = Recipe.parse(ledger.recipe(best.recipe_hash, ledger.run("a").id))
    first = recipes_of(tmp_path, "a", layers)[0]
    assert under == first, "a gradient begins where weights ended"


#: Of the models' depth, and nothing that layers can stand beside.
SCALED = """
merge_method: passthrough
slices:
- sources: [{model: north, layer_range: [0, 4], parameters: {scale: 0.9}}]
"""
REORDERED = """
merge_method: passthrough
slices:
- sources: [{model: north, layer_range: [0, 1]}]
- sources: [{model: north, layer_range: [2, 3]}]
- sources: [{model: north, layer_range: [1, 2]}]
- sources: [{model: north, layer_range: [3, 4]}]
"""
STAGED = """
name: first
merge_method: linear
models: [{model: north, parameters: {weight: 1}}, {model: south, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: first, parameters: {weight: 2}}, {model: north, parameters: {weight: 1}}]
"""


@pytest.mark.parametrize("text", [SCALED, REORDERED, STAGED], ids=["scaled", "reordered", "staged"])
def test_a_warm_start_of_other_layers_does_not_keep_layers_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """They stand beside those of the best merge that has its models' own."""
    path = tmp_path / "init.yml"
    path.write_text(text)
    score, load = FakeWorker.score, FakeWorker.load
    first = Recipe.parse(path).at("float32").canonical(4).hash()

    def loading(self: Any, recipe: Recipe) -> Any:
        self.best = recipe.canonical(4).hash() == first
        return load(self, recipe)

    def scoring(self: Any, items: Any) -> Any:
        found = score(self, items)
        return [replace(one, value=1.0, margin=9.0) for one in found] if self.best else found

    monkeypatch.setattr(FakeWorker, "load", loading)
    monkeypatch.setattr(FakeWorker, "score", scoring)
    driving.run(config(**layered(search={"init": [str(path)]})), name="a", runs_dir=tmp_path)
    (opening,), candidates = moves_of(tmp_path, "a")
    assert (opening.move.change, opening.refusal) == ("layers", "")
    before = [c for c in candidates if c.generation <= opening.generation and c.score is not None]
    best, second, *_ = sorted((c for c in before if c.twin is None), key=lambda c: c.rank)
    assert best.operator == "init"
    assert opening.move.value == f"{second.generation}.{second.slot}"


@pytest.mark.parametrize("objective", ["accuracy", "perplexity", "loss"], indirect=True)
def test_layers_give_what_weights_cannot(tmp_path: Path, objective: Any) -> None:
    """On the fake worker, where added layers answer items that no weights answer."""
    sections = layered(budget={"max_evaluations": 110})
    driving.run(config(**sections), name="a", runs_dir=tmp_path)
    _, candidates = moves_of(tmp_path, "a")
    weights = candidates[0].space
    mine, theirs = (
        min(c.rank for c in candidates if (c.space == weights) == own) for own in (False, True)
    )
    assert mine < theirs


def test_killed_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    sections = layered(worker={"options": {"base": "base", "delay_s": 0.02}})
    path = tmp_path / "config.yml"
    path.write_text(config_text(**sections))
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    driving.run(config(**sections), name="a", runs_dir=calm)
    log = torn / "a" / "log.jsonl"
    assert kill_after(command("run", path, "--name", "a", "--runs-dir", torn), log, 24, 0.01)
    driving.resume("a", runs_dir=torn)
    assert trace_of(torn, "a") == trace_of(calm, "a")


def test_a_branch_keeps_its_layers_and_may_search_others(tmp_path: Path) -> None:
    driving.run(config(**layered()), name="a", runs_dir=tmp_path)
    (opening,), _ = moves_of(tmp_path, "a")
    driving.branch("a", at=opening.generation + 2, name="b", runs_dir=tmp_path)
    assert trace_of(tmp_path, "b") == trace_of(tmp_path, "a")
    driving.branch(
        "a", at=opening.generation + 2, name="c", runs_dir=tmp_path,
        overrides={"genome.layers": 1, "budget.max_evaluations": 90},
    )  # fmt: skip
    (again,), candidates = moves_of(tmp_path, "c")
    assert again.refusal == ""
    assert again.generation > opening.generation
    *_, layers = dict.fromkeys(c.space for c in candidates)
    assert max(depth(recipe) for recipe in recipes_of(tmp_path, "c", layers)) == 5
    assert replay("c", runs_dir=tmp_path).identical


def test_a_gradient_is_asked_of_absent_layers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Observation] = []
    propose = GradientSteps.propose

    def told(self, space, history, guidance, count, rng_for):
        if space.stacks is not None:
            seen.extend(o for o in history if o.space == space.key)
        return propose(self, space, history, guidance, count, rng_for)

    monkeypatch.setattr(GradientSteps, "propose", told)
    driving.run(config(**layered(1)), name="a", runs_dir=tmp_path)
    found = [o.gradient for o in seen if o.gradient is not None]
    assert {len(gradient) for gradient in found} == {16}
    assert all(x != 0 for gradient in found for x in gradient)


@pytest.mark.parametrize(("built", "refusal"), [(2, ""), (1, "6 layers")])
def test_layers_open_for_a_worker_that_is_built_as_deep_as_a_candidate_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: int, refusal: str
) -> None:
    """A stack with every place there, which only gradients are asked of, may be deeper."""
    of_names = prepare._of_names
    kind = SimpleNamespace(runs_stacks=True, fixed_depth=True)

    def short(look: Any) -> Any:
        return replace(of_names(look), check=lambda r: refuse_stack(r, 4, "short", kind, built))

    monkeypatch.setattr(prepare, "_of_names", short)
    driving.run(config(**layered(2, "cma_es")), name="a", runs_dir=tmp_path)
    (opening,), _ = moves_of(tmp_path, "a")
    assert refusal in opening.refusal
    assert bool(refusal) == bool(opening.refusal)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"genome": {"layers": 4}, "search": {"structure": "fixed"}}, "structure to advised or"),
        ({"genome": {"layers": 4, "tokenizer_source": "union"}}, "with genome.tokenizer_source"),
    ],
)
def test_layers_that_cannot_be_searched_are_a_fault(
    tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        driving.run(config(**sections), name="a", runs_dir=tmp_path)


def test_a_model_asks_for_layers_and_is_told_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(mover(("none", ""), ("layers", "7"))) as server:
        sections = layered(4, "llm_evo")
        sections |= {"agents": advised(server)["agents"], "budget": {"max_evaluations": 60}}
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
        asked = [r.body["messages"] for r in server.requests if role_of(r.body) == "proposer"]
    (opening,), candidates = moves_of(tmp_path, "a")
    assert (opening.generation, opening.move.why, opening.refusal) == (1, "to see", "")
    best = min((c for c in candidates if c.generation <= 1), key=lambda c: c.rank)
    assert opening.move.value == f"{best.generation}.{best.slot}", "whatever the model named"
    first, *_, last = asked
    assert "up to 4 layers of the models may run beside the 4" in first[0]["content"]
    assert "may run beside" not in last[0]["content"], "it was opened"
    told = [Told(m) for m in asked if "Method: layers beside" in m[1]["content"]]
    assert "costs 1/4 more time a token. At most 8 layers run" in told[0].user
    assert ("place 1: north's layer 0 attention", "0 is -0.5, 100 is 1.5") in told[0].axes
    assert replay("a", runs_dir=tmp_path).identical


def test_a_model_cannot_ask_for_layers_that_nobody_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(mover(("layers", ""))) as server:
        driving.run(config(**advised(server)), name="a", runs_dir=tmp_path)
        assert "no layers can be searched here" in str([r.body for r in server.requests])
        assert '"change \\"layers\\"' not in str(server.requests[0].body)
    assert moves_of(tmp_path, "a")[0] == []


def test_check_says_what_layers_cost(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yml"
    path.write_text(config_text(**layered({"most": 3})))
    assert run_app(["check", str(path), "--runs-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "layers       16 dimensions once weights are done; at most 7 layers for 4, 1.8 times the "
        "cost a token\n"
    ) in said
    assert run_app(["check", str(path), "--json", "--runs-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["layers"]["deepest"] == 7


def test_the_command_line_asks_for_layers(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yml"
    sections = layered(None)
    path.write_text(config_text(**sections))
    runs = ["--runs-dir", str(tmp_path)]
    assert run_app(["run", str(path), "--layers", "2", "--name", "a", *runs]) == 0
    _, candidates = moves_of(tmp_path, "a")
    _, layers = dict.fromkeys(c.space for c in candidates)
    assert max(depth(recipe) for recipe in recipes_of(tmp_path, "a", layers)) <= 6
    assert "layers beside those of" in capsys.readouterr().err
