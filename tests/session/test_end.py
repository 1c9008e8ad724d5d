"""The end of a search is total: whatever sealed items do, there is an answer, and the card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.errors import NoWorker, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.packing import unpack_keys
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.workers.fake import FakeWorker
from tests.session.conftest import config

pytestmark = pytest.mark.usefixtures("objectives")


def ended(folder: Path, name: str = "a", evaluations: int = 18, **options: object) -> RunRow:
    budget = {"max_evaluations": evaluations}
    settings = config(budget=budget, worker={"options": options})
    return driving.run(settings, name=name, runs_dir=folder)


def own_hash(folder: Path, recipe_hash: str) -> str:
    """A recipe's hash as the fake worker computes it."""
    with Ledger(folder / driving.LEDGER) as ledger:
        return Recipe.parse(ledger.recipe(recipe_hash)).hash()


def sealed_document(folder: Path) -> int:
    with Ledger(folder / driving.LEDGER) as ledger:
        spec = driving.prepare(driving.SearchConfig.from_text(ledger.run("a").config)).spec
    return FakeWorker.tasks(spec).refs("sealed")[0].index


def test_the_next_best_is_the_answer_where_a_sealed_item_of_the_best_fails(tmp_path: Path) -> None:
    before = ended(tmp_path / "sound")
    chosen = before.result["answer"]
    bad = {
        "fail_items": [sealed_document(tmp_path / "sound")],
        "fail_items_when": [own_hash(tmp_path / "sound", chosen["recipe_hash"])],
    }
    row = ended(tmp_path, **bad)
    card = row.result
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert card["answer"]["recipe_hash"] != chosen["recipe_hash"]
    assert card["answer"]["sealed_score"] is not None
    assert any("was chosen, and its sealed items failed" in note for note in card["notes"])
    best = (tmp_path / "a" / "best.yml").read_text()
    assert Recipe.parse(best).hash() == own_hash(tmp_path, card["answer"]["recipe_hash"])
    assert replay("a", runs_dir=tmp_path).identical
    assert driving.resume("a", runs_dir=tmp_path).result == card


def test_where_no_sealed_item_can_be_scored_the_search_items_decide(tmp_path: Path) -> None:
    answer = ended(tmp_path / "sound", evaluations=30).result["answer"]
    bad = [sealed_document(tmp_path / "sound")]
    row = ended(tmp_path, evaluations=30, fail_items=bad)
    assert row.status == "done"
    assert row.result["answer"]["recipe_hash"] == answer["recipe_hash"]
    assert not row.result["sealed"]
    assert any("it is not confirmed" in note for note in row.result["notes"])
    assert "search" in row.result["verdict"] or "cheap" in row.result["verdict"]
    assert replay("a", runs_dir=tmp_path).identical


def test_a_parent_that_fails_on_sealed_items_is_left_out_and_named(tmp_path: Path) -> None:
    sound = ended(tmp_path / "sound").result
    parent = next(p for p in sound["parents"] if p["recipe_hash"] != sound["answer"]["recipe_hash"])
    row = ended(
        tmp_path,
        fail_items=[sealed_document(tmp_path / "sound")],
        fail_items_when=[own_hash(tmp_path / "sound", parent["recipe_hash"])],
    )
    assert row.result["answer"]["recipe_hash"] == sound["answer"]["recipe_hash"]
    assert any("is not compared on sealed items" in note for note in row.result["notes"])
    assert parent["name"] not in {d["against"] for d in row.result["differences"]}


@pytest.mark.parametrize("fault", [RuntimeError("no kernel image"), MemoryError()], ids=str)
def test_a_worker_lost_at_the_end_leaves_a_card_that_resume_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    sound = ended(tmp_path / "sound").result
    score, broken = FakeWorker.score, [True]

    def dying(self, items):
        if broken and items[0].index >= 60:
            raise fault
        return score(self, items)

    monkeypatch.setattr(FakeWorker, "score", dying)
    row = ended(tmp_path)
    assert row.status == "done"
    assert row.result["answer"]["recipe_hash"] == sound["answer"]["recipe_hash"]
    assert any("resume asks them" in note for note in row.result["notes"])
    assert (tmp_path / "a" / "best.yml").is_file()
    assert replay("a", runs_dir=tmp_path).identical
    broken.clear()
    assert driving.resume("a", runs_dir=tmp_path).result == sound


def test_a_worker_lost_among_the_rivals_is_said_and_resume_asks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ended(tmp_path / "sound").result
    score, broken = FakeWorker.score, [True]
    answer = own_hash(tmp_path / "sound", sound["answer"]["recipe_hash"])
    load = FakeWorker.load

    def loading(self, recipe):
        self.own = recipe.hash()
        return load(self, recipe)

    def dying(self, items):
        if broken and items[0].index >= 60 and self.own != answer:
            raise RuntimeError("no kernel image")
        return score(self, items)

    monkeypatch.setattr(FakeWorker, "load", loading)
    monkeypatch.setattr(FakeWorker, "score", dying)
    row = ended(tmp_path)
    card = row.result
    assert row.status == "done"
    assert card["answer"]["recipe_hash"] == sound["answer"]["recipe_hash"]
    assert "no kernel image" in card["lost"]
    assert any("resume asks them" in note for note in card["notes"])
    assert replay("a", runs_dir=tmp_path).identical
    broken.clear()
    assert driving.resume("a", runs_dir=tmp_path).result == sound


def test_sealed_items_are_asked_of_the_answer_the_parents_and_the_best_cheap_merge(
    tmp_path: Path,
) -> None:
    row = ended(tmp_path)
    card = row.result
    search_items = {item for keys in items(tmp_path, "search").values() for item in keys}
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        blocks = ledger.records(
            "SELECT recipe_hash, s.keys AS keys FROM results r JOIN item_sets s "
            "ON s.id = r.item_set_id"
        )
    asked = {b["recipe_hash"] for b in blocks if not set(unpack_keys(b["keys"])) & search_items}
    due = {row["recipe_hash"] for row in [card["answer"], card["best_rival"], *card["parents"]]}
    assert asked == due


def items(folder: Path, part: str) -> dict[str, list[str]]:
    with Ledger(folder / driving.LEDGER) as ledger:
        return ledger.item_keys(ledger.run("a").id, part)


def test_a_search_that_never_began_gives_its_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FakeWorker.__init__

    def refused(self, *given):
        raise RuntimeError("this parent is broken")

    monkeypatch.setattr(FakeWorker, "__init__", refused)
    with pytest.raises(NoWorker):
        ended(tmp_path)
    monkeypatch.setattr(FakeWorker, "__init__", made)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        row = ledger.run("a")
        identities = dict.fromkeys(row.facts["identities"], "as it was")
        ledger.update_run(row.id, facts=row.facts | {"identities": identities})
    with pytest.raises(UserError, match="under the name a again, since nothing is scored"):
        driving.resume("a", runs_dir=tmp_path)
    assert ended(tmp_path).status == "done"
    with pytest.raises(UserError, match="a run called 'a' exists"):
        ended(tmp_path)


def test_evaluations_that_are_left_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentmerge.strategies.random import STRATEGY

    monkeypatch.setattr(type(STRATEGY), "propose", lambda *given: [])
    settings = config(search={"algorithm": "random"}, budget={"max_evaluations": 30})
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    row = driving.resume("a", runs_dir=tmp_path, overrides={"budget.max_evaluations": 240})
    assert row.stop_reason == "nothing more to gain"
    (note,) = [note for note in row.result["notes"] if "evaluations are left" in note]
    assert "random has nothing more to propose, and a larger budget changes nothing" in note
