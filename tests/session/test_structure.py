"""Structural moves: a space that an agent or the ladder opens, its trial, approval and replay."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.contracts.advice import StructuralMove
from agentmerge.errors import UserError
from agentmerge.ledger import Candidate, Ledger
from agentmerge.ledger.words import Opening, openings
from agentmerge.search.structure import agreed
from agentmerge.search.trials import TRIAL, trials_of
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.moves import finer, moved
from agentmerge.strategies.llm_evo import LlmEvo
from agentmerge.testing.scripted import ScriptedServer
from tests.reading import Told
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_agents import advised, adviser
from tests.session.test_faults import role_of
from tests.session.test_resume import kill_after

BUDGET = {"max_evaluations": 70}


def mover(*moves: tuple[str, str]):
    """A model whose proposer asks for these moves, whatever it is shown."""

    def reply(body: dict) -> dict:
        said = adviser(body)
        if role_of(body) != "proposer":
            return said
        told = Told(body["messages"])
        change, value = moves[min(told.generation, len(moves) - 1)]
        genome = (said["mean_genome"] * told.dimensions)[: told.dimensions]
        move = {"change": change, "value": value, "why": "to see"}
        return said | {"mean_genome": genome, "candidates": [], "structural_move": move}

    return reply


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")


def moves_of(runs_dir: Path, name: str) -> tuple[list[Opening], list[Candidate]]:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        row = ledger.run(name)
        return openings(ledger.advice(row.id)), ledger.candidates(row.id)


@pytest.mark.parametrize("algorithm", ["llm_evo", "auto", "cma_es"])
@pytest.mark.parametrize(
    "move",
    [("method", "ties"), ("granularity", "1"), ("filters", "self_attn, mlp"), ("method", "slerp")],
)
def test_a_move_opens_a_space_that_gets_its_trial(
    tmp_path: Path, algorithm: str, move: tuple[str, str]
) -> None:
    with ScriptedServer(mover(move)) as server:
        sections = advised(server, search={"algorithm": algorithm, "sealed_share": 0.0})
        row = driving.run(config(**sections, budget=BUDGET), name="a", runs_dir=tmp_path)
        assert row.status == "done"
        found, candidates = moves_of(tmp_path, "a")
    assert [(o.move.change, o.move.value, o.refusal) for o in found] == [(*move, "")]
    spaces = dict.fromkeys(c.space for c in candidates)
    assert len(spaces) == 2
    own, opened = spaces
    later = [c for c in candidates if c.generation > found[0].generation]
    trial = [c for c in later if c.space == opened]
    assert sum(c.cost for c in trial) >= TRIAL or row.stop_reason == "nothing more to gain"
    assert any(c.space == own for c in later), "the space that led has its turns meanwhile"
    assert replay("a", runs_dir=tmp_path).identical


@pytest.mark.parametrize("objective", ["accuracy", "loss"], indirect=True)
def test_a_space_begins_with_the_best_as_near_as_they_come(tmp_path: Path, objective) -> None:
    with ScriptedServer(mover(("method", "ties"))) as server:
        driving.run(config(**advised(server), budget=BUDGET), name="a", runs_dir=tmp_path)
    found, candidates = moves_of(tmp_path, "a")
    first = [c for c in candidates if c.operator == "structure"]
    assert [c.label.split()[0] for c in first][:3] == ["from", "from", "from"]
    best = max(
        (c for c in candidates if c.generation <= found[0].generation), key=lambda c: c.score or 0
    )
    assert f"from {best.generation}.{best.slot}" == first[0].label
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert "merge_method: ties" in ledger.recipe(first[0].recipe_hash)


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (("method", "task_arithmetic"), "has already"),
        (("drop_model", "north"), "at least"),
        (("granularity", "2"), "has already"),
    ],
)
def test_a_move_that_opens_nothing_is_kept_with_the_reason(
    tmp_path: Path, move: tuple[str, str], reason: str
) -> None:
    with ScriptedServer(mover(move)) as server:
        row = driving.run(config(**advised(server), budget=BUDGET), name="a", runs_dir=tmp_path)
        told = [r.body["messages"][1]["content"] for r in server.requests]
    found, candidates = moves_of(tmp_path, "a")
    assert row.status == "done"
    assert len(found) == 1
    assert reason in found[0].refusal
    assert len({c.space for c in candidates}) == 1
    assert f"not made: {found[0].refusal}" in told[-1], "the agents are told"


def test_fixed_carries_nothing_out(tmp_path: Path) -> None:
    with ScriptedServer(mover(("method", "ties"))) as server:
        sections = advised(server, search={"structure": "fixed"})
        driving.run(config(**sections, budget=BUDGET), name="a", runs_dir=tmp_path)
    assert moves_of(tmp_path, "a")[0] == []


def test_approval_waits_for_the_user(tmp_path: Path, capsys) -> None:
    runs = ["--runs-dir", str(tmp_path)]
    with ScriptedServer(mover(("method", "ties"), ("granularity", "1"))) as server:
        path = tmp_path / "config.yml"
        path.write_text(config_text(**advised(server), budget=BUDGET))
        assert run_app(["run", str(path), "--approve", "--name", "a", *runs]) == 0
        said = capsys.readouterr().err
        assert "waiting for your answer: open another search space: merge method ties" in said
        assert "--answer yes (or no)" in said
        assert run_app(["resume", "a", *runs]) == 0, "no answer: it waits on"
        assert moves_of(tmp_path, "a")[0] == []
        assert run_app(["resume", "a", "--answer", "no", *runs]) == 0
        found, _ = moves_of(tmp_path, "a")
        assert [o.refusal for o in found] == ["you said no"]
        assert "waiting for your answer" in capsys.readouterr().err, "the next move asks again"
        assert run_app(["resume", "a", "--answer", "yes", *runs]) == 0
    found, candidates = moves_of(tmp_path, "a")
    assert [o.refusal for o in found] == ["you said no", ""]
    assert run_app(["show", "a", *runs]) == 0
    shown = capsys.readouterr().out
    assert "merge method ties (to see): not opened: you said no" in shown
    assert "layer_granularity 1 (to see): opened, on trial" in shown
    assert len({c.space for c in candidates}) == 2
    capsys.readouterr()
    assert run_app(["resume", "a", "--answer", "yes", *runs]) == 2
    assert "asks nothing" in capsys.readouterr().err
    assert replay("a", runs_dir=tmp_path).identical


def test_an_answer_is_to_the_move_that_was_asked(tmp_path: Path) -> None:
    """Where another move is due by then, it is asked anew."""
    with ScriptedServer(mover(("method", "ties"))) as server:
        sections = advised(server, search={"approve": True})
        row = driving.run(config(**sections, budget=BUDGET), name="a", runs_dir=tmp_path)
        assert (row.status, "method ties" in row.stop_reason) == ("waiting", True)
        with sqlite3.connect(tmp_path / driving.LEDGER) as conn:
            [at] = conn.execute("SELECT max(generation) FROM advice").fetchone()
            [body] = conn.execute(
                "SELECT body FROM advice WHERE role = 'proposer' AND generation = ?", [at]
            ).fetchone()
            said = json.loads(body)
            said["guidance"]["structural_move"] |= {"change": "granularity", "value": "1"}
            conn.execute(
                "UPDATE advice SET body = ? WHERE role = 'proposer' AND generation = ?",
                [json.dumps(said), at],
            )
        row = driving.resume("a", runs_dir=tmp_path, answer=True)
        assert (row.status, "granularity 1" in row.stop_reason) == ("waiting", True)
        assert moves_of(tmp_path, "a")[0] == [], "nobody agreed to this one"
        driving.resume("a", runs_dir=tmp_path, answer=True)
    found, _ = moves_of(tmp_path, "a")
    assert [(o.move.change, o.refusal) for o in found] == [("granularity", "")]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (True, True), ("yes", True), ("no", False), (None, False), ({}, False), ([{}], False),
        ({"approved": True}, False), ({"asked": "ties", "approved": True}, False),
        ({"asked": {}, "approved": True}, None),
        ({"asked": {"change": "method", "value": "ties"}}, False),
        ({"asked": {"change": "method", "value": "ties"}, "approved": True}, True),
        ({"asked": {"change": "method", "value": "linear"}, "approved": True}, None),
    ],
)  # fmt: skip
def test_whatever_a_client_says_is_an_answer(said: object, expected: bool | None) -> None:
    assert agreed(said, StructuralMove("method", "ties", "to see")) is expected


def test_killed_in_a_trial_it_ends_the_same(tmp_path: Path) -> None:
    with ScriptedServer(mover(("method", "ties"))) as server:
        sections = advised(server)
        sections["worker"] = {"options": {"base": "base", "delay_s": 0.02}}
        text = config_text(**sections, budget=BUDGET)
        path = tmp_path / "config.yml"
        path.write_text(text)
        calm, torn = tmp_path / "calm", tmp_path / "torn"
        driving.run(config(**sections, budget=BUDGET), name="a", runs_dir=calm)
        log = torn / "a" / "log.jsonl"
        assert kill_after(command("run", path, "--name", "a", "--runs-dir", torn), log, 45, 0.01)
        assert kill_after(command("resume", "a", "--runs-dir", torn), log, 25, 0.02)
        driving.resume("a", runs_dir=torn)
    assert trace_of(torn, "a") == trace_of(calm, "a")


def test_the_arm_that_hears_no_model_is_not_seen_from_another_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, set[tuple[int, int]]]] = []
    propose = LlmEvo.propose

    def told(self, space, history, guidance, count, rng_for):
        if guidance is not None and guidance.source == "model":
            seen.append((space.key, {(o.generation, o.slot) for o in history}))
        return propose(self, space, history, guidance, count, rng_for)

    monkeypatch.setattr(LlmEvo, "propose", told)
    none = ("none", "")
    with ScriptedServer(mover(none, none, ("granularity", "1"))) as server:
        sections = advised(server, search={"shadow": 0.3})
        driving.run(config(**sections, budget={"max_evaluations": 90}), name="a", runs_dir=tmp_path)
    _, candidates = moves_of(tmp_path, "a")
    shadows = {(c.generation, c.slot) for c in candidates if c.operator == "shadow"}
    assert shadows
    assert len({key for key, _ in seen}) == 2, "both spaces were searched"
    assert not any(shadows & history for _, history in seen)


def test_a_branch_keeps_the_spaces_and_may_change_the_genome(tmp_path: Path) -> None:
    with ScriptedServer(mover(("granularity", "1"))) as server:
        row = driving.run(config(**advised(server), budget=BUDGET), name="a", runs_dir=tmp_path)
        found, _ = moves_of(tmp_path, "a")
        driving.branch("a", at=found[0].generation + 2, name="b", runs_dir=tmp_path)
        driving.branch(
            "a", at=2, name="c", runs_dir=tmp_path,
            overrides={"genome.layer_granularity": 4, "search.structure": "fixed"},
        )  # fmt: skip
    assert row.status == "done"
    assert moves_of(tmp_path, "b")[0] == found
    assert trace_of(tmp_path, "b") == trace_of(tmp_path, "a")
    _, candidates = moves_of(tmp_path, "c")
    assert {len(c.vector) for c in candidates if c.generation > 2 and c.vector} == {2}


@pytest.mark.slow
def test_a_space_that_few_evaluations_did_not_open_is_told(tmp_path: Path) -> None:
    """It said that a larger budget changes nothing, and a larger budget opened a space."""
    sections = {
        "genome": {"layer_granularity": 0},
        "search": {"algorithm": "auto", "structure": "free"},
        "budget": {"max_evaluations": 40},
        "limit": 200,
        "worker": {"options": {"num_layers": 4, "documents": 800}},
    }
    row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    assert row.stop_reason == "nothing more to gain"
    (note,) = [note for note in row.result["notes"] if "evaluations are left" in note]
    assert "another search space (granularity 2) is opened only while 32 are" in note
    lacking = int(re.search(r"resume with (\d+) more", note).group(1))
    more = {"budget.max_evaluations": 40 + lacking}
    driving.resume("a", runs_dir=tmp_path, overrides=more)
    assert [o.move.value for o in moves_of(tmp_path, "a")[0]] == ["2"]
    assert replay("a", runs_dir=tmp_path).identical


def test_free_goes_finer_where_nothing_is_left(tmp_path: Path) -> None:
    sections = {
        "genome": {"layer_granularity": 0},
        "search": {"algorithm": "auto", "structure": "free"},
        "worker": {"options": {"base": "base"}},
        "limit": None,
    }
    sections.pop("limit")
    settings = config(**sections, budget={"max_evaluations": 90})
    driving.run(settings, name="a", runs_dir=tmp_path)
    found, candidates = moves_of(tmp_path, "a")
    assert [o.move.change for o in found][:1] == ["granularity"]
    widths = {len(c.vector) for c in candidates if c.vector}
    assert len(widths) > 1
    assert replay("a", runs_dir=tmp_path).identical


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace(config().genome, 4, "float32")


def test_the_better_of_two_spaces_leads(space: SearchSpace) -> None:
    move = StructuralMove("granularity", "1")
    other = moved(space, move)

    def rows(first: float, second: float, count: int = TRIAL) -> list[Candidate]:
        shared = Candidate(0, 0, "parent", "north", None, "p", "scored", 0.5, space=space.key)
        made = [
            Candidate(g, 0, "cma_es", "", None, f"{g}", "scored", s, space=key)
            for g, (s, key) in enumerate([(first, space.key), (second, other.key)] * count, 1)
        ]
        return [shared, *made]

    opening = [Opening(0, move)]
    assert trials_of(space, opening, rows(0.6, 0.7, 3)).trial == other
    assert trials_of(space, opening, rows(0.6, 0.7)).leader == other
    assert trials_of(space, opening, rows(0.7, 0.6)).leader == space
    assert trials_of(space, opening, rows(0.6, 0.6)).leader == space, "a tie changes nothing"
    assert trials_of(space, [replace(opening[0], refusal="no")], rows(0.6, 0.7)).leader == space
    ahead = trials_of(space, opening, rows(0.6, 0.7, 3)[:-1])
    assert ahead.turn == (other, space), "who was asked less has the next turn"


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "an older ledger"])
def test_a_trial_that_ended_is_not_decided_anew_by_the_next(space: SearchSpace, kept: bool) -> None:
    moves = [StructuralMove("method", "ties"), StructuralMove("granularity", "1")]
    ties = moved(space, moves[0])
    fine = moved(ties, moves[1])
    scores = [(0.6, space.key), (0.7, ties.key)] * TRIAL
    rows = [
        Candidate(g, 0, "cma_es", "", None, f"{g}", "scored", score, space=key)
        for g, (score, key) in enumerate(scores, 1)
    ]
    openings = [Opening(0, moves[0]), Opening(len(rows), moves[1], leader=ties.key * kept)]
    assert trials_of(space, openings, rows).turn == (fine, ties)
    better = Candidate(len(rows) + 1, 0, "cma_es", "", None, "b", "scored", 0.8, space=fine.key)
    found = trials_of(space, openings, [*rows, better])
    assert (found.leader, found.trial, found.spaces) == (ties, fine, (space, ties, fine))


def test_a_move_is_from_the_space_that_led_when_it_was_made(space: SearchSpace) -> None:
    """In a window the last of a trial were pending; what they showed comes too late for it."""
    moves = [StructuralMove("method", "ties"), StructuralMove("granularity", "1")]
    ties, fine = (moved(space, move) for move in moves)
    scores = [(0.6, space.key), (0.5, ties.key)] * (TRIAL - 1) + [(0.6, space.key), (0.7, ties.key)]
    rows = [
        Candidate(g, 0, "cma_es", "", None, f"{g}", "scored", score, space=key)
        for g, (score, key) in enumerate(scores, 1)
    ]
    openings = [Opening(0, moves[0]), Opening(len(rows), moves[1], leader=space.key)]
    assert trials_of(space, openings, rows).spaces == (space, ties, fine)


def test_recipes_keep_what_both_spaces_know(space: SearchSpace) -> None:
    recipe = space.recipe((0.2, 0.4, 0.6, 0.8))
    fine = moved(space, StructuralMove("granularity", "1"))
    assert fine.recipe(fine.nearest(recipe)).hash({}) == recipe.hash({})
    ties = moved(space, StructuralMove("method", "ties"))
    values = {a.name: a.value(x) for a, x in zip(ties.axes, ties.nearest(recipe), strict=True)}
    assert values["layers 0-1 north density"] == 1.0
    coarse = moved(space, StructuralMove("granularity", "4"))
    assert coarse.nearest(recipe) == pytest.approx((0.4, 0.6))
    slerp = moved(space, StructuralMove("method", "slerp"))
    assert slerp.nearest(recipe) == pytest.approx((2 / 3, 0.8 / 1.4))


def test_the_ladder_ends_at_single_projections(space: SearchSpace) -> None:
    rungs = []
    while (move := finer(space)) is not None:
        rungs.append(move.value)
        space = moved(space, move)
    assert rungs[:2] == ["1", "self_attn, mlp"]
    assert "q_proj" in rungs[2]
    assert len(rungs) == 3


def test_no_space_of_an_unknown_method(space: SearchSpace) -> None:
    with pytest.raises(UserError, match="no merge method 'magic'"):
        moved(space, StructuralMove("method", "magic"))
