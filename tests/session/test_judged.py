"""Tasks that a model judges: what is asked once, what is missing, what it may cost.

On the fake worker, whose answers say how good they are; the judges are scripts.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from agentmerge.contracts.operators import UNIFORM
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import ConfigError, RunFailed, TaskError
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet
from agentmerge.ledger import Candidate, Ledger, ResultKey
from agentmerge.ledger.folder import LEDGER
from agentmerge.report.summary import run_summary, trace
from agentmerge.search.choosing import beyond_noise
from agentmerge.search.judging import Judges
from agentmerge.session import driving
from agentmerge.session.doctor import forecast
from agentmerge.strategies import margins
from agentmerge.strategies.front import Worst
from agentmerge.strategies.table import Table
from agentmerge.testing import Fault, ScriptedServer, scripted_chat_model
from tests.session.conftest import config

TURNS, ITEMS = 2, 6


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of two turns."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"id": n, "turns": [f"What is {n}?", "And twice that?"], "references": [None, str(2 * n)]}
        for n in range(ITEMS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def level(text: str) -> float:
    return float(re.findall(r"level ([\d.]+)", text)[-1])


def points(messages: list) -> Any:
    """A judge without noise."""
    return {"reason": "as it says", "points": round(1 + 9 * level(messages[-1].text), 2)}


class Judge:
    """Counts what it is asked."""

    def __init__(self, says: Callable[[list], Any] = points) -> None:
        self.asked: Counter[str] = Counter()
        self.says = says
        self.chat = scripted_chat_model(self._reply)

    def _reply(self, messages: list) -> Any:
        self.asked[messages[-1].text] += 1
        return self.says(messages)

    @property
    def models(self) -> Any:
        return {"judge": self.chat}


def asking(chats: Path, evaluations: int = 10, tasks: list | None = None, **judge: Any) -> Any:
    judged = {"model": "openai:scripted", "conversations": str(chats), "twice": 0, **judge}
    return config(
        tasks=[{"name": "chats", "judge": judged}, *(tasks or [])],
        search={"algorithm": "cma_es", "seed": 7, "population": 4},
        budget={"max_evaluations": evaluations},
        limit=None,
    )


def results_of(runs: Path, name: str) -> dict[tuple[int, int], list]:
    with Ledger(runs / LEDGER) as ledger:
        row = ledger.run(name)
        engine = ledger.run(name).facts["engine"]
        from agentmerge.contracts.worker import EngineInfo

        return {
            (c.generation, c.slot): [
                *ledger.results(
                    ResultKey(c.recipe_hash, EngineInfo(**engine), row.facts["protocols"]["chats"])
                ).values()
            ]
            for c in ledger.candidates(row.id)
        }


def test_no_verdict_is_asked_twice(tmp_path: Path, chats: Path) -> None:
    judge = Judge()
    row = driving.run(asking(chats, 14), name="a", runs_dir=tmp_path, models=judge.models)
    assert row.status == "done"
    assert set(judge.asked.values()) == {1}
    first = len(judge.asked)
    assert first <= 14 * ITEMS * TURNS
    # Another search of the same merges that asks something else beside, and a branch.
    more = [{"name": "text", "metric": "word_perplexity,none", "weight": 0.1}]
    driving.run(asking(chats, 6, more), name="b", runs_dir=tmp_path, models=judge.models)
    driving.branch(
        "a", at=1, name="c", runs_dir=tmp_path, models=judge.models,
        overrides={"search.sigma0": 0.3, "budget.max_evaluations": 14},
    )  # fmt: skip
    assert set(judge.asked.values()) == {1}, "what a branch found anew was asked once"
    with Ledger(tmp_path / LEDGER) as ledger:
        assert ledger.call_totals(ledger.run("b").id)["calls"] == 0
        assert ledger.call_totals(row.id)["calls"] == first


def test_a_search_that_was_cut_off_repeats_no_verdict(tmp_path: Path, chats: Path) -> None:
    whole = Judge()
    driving.run(asking(chats), name="a", runs_dir=tmp_path / "whole", models=whole.models)

    def down(messages: list) -> Any:
        if sum(cut.asked.values()) % 40 >= 30:  # for ten questions, and so in the middle
            raise ConnectionResetError("gone")
        return points(messages)

    cut = Judge(down)
    answered, told = Counter[str](), list[str]()
    settings = asking(chats, max_retries=0)
    go: Any = lambda: driving.run(settings, name="a", runs_dir=tmp_path, models=cut.models)  # noqa: E731
    for _ in range(12):
        try:
            row = go()
            break
        except RunFailed as error:
            told.append(str(error))
            go = lambda: driving.resume("a", runs_dir=tmp_path, models=cut.models)  # noqa: E731
    assert told
    assert all("does not answer" in text and "and resume" in text for text in told)
    assert row.status == "done"
    with Ledger(tmp_path / LEDGER) as ledger, Ledger(tmp_path / "whole" / LEDGER) as other:
        answered.update(
            r["prompt_hash"]
            for r in ledger.records("SELECT prompt_hash FROM model_calls WHERE ending = 'answered'")
        )
        assert set(answered.values()) == {1}
        assert sum(name.endswith("/0") for name in answered) == len(whole.asked)
        assert trace(ledger, ledger.run("a")) == trace(other, other.run("a"))


def test_an_answer_without_a_verdict_is_a_missing_item(tmp_path: Path, chats: Path) -> None:
    """Not a number, not a failure, and no advantage for who misses the hard ones."""

    def picky(messages: list) -> Any:
        said = messages[-1].text if len(messages) < 4 else messages[1].text
        hard = "What is 3?" in said or "What is 5?" in said
        return "no" if hard and level(said) * 1e6 % 3 < 1 else points(messages[:2])

    judge, told = Judge(picky), []
    row = driving.run(
        asking(chats, 14), name="a", runs_dir=tmp_path, models=judge.models, emit=told.append
    )
    found = results_of(tmp_path, "a")
    missing = {at: [r for r in rows if r.missing] for at, rows in found.items()}
    assert any(missing.values())
    assert all(math.isnan(r.value) for rows in missing.values() for r in rows)
    assert all(len(rows) == ITEMS for rows in found.values())
    notes = [event["text"] for event in told if event["event"] == "note"]
    assert any("no verdict on turn" in text for text in notes)
    with Ledger(tmp_path / LEDGER) as ledger:
        candidates = ledger.candidates(row.id)
        assert all(c.state == "scored" and math.isfinite(c.score or 0) for c in candidates)
        summary = run_summary(ledger, ledger.run("a"))
    assert summary["judges"]["chats"]["unjudged"] > 0
    # The items that it has, beside the best before it on these items.
    scored = {(c.generation, c.slot): c.score for c in candidates}
    for c in candidates:
        earlier = [d for d in candidates if d.generation < c.generation]
        if not missing[c.generation, c.slot] or not earlier:
            continue
        best = max(earlier, key=lambda d: (d.score, -d.generation, -d.slot))
        mine, theirs = found[c.generation, c.slot], found[best.generation, best.slot]
        both = [(m, t) for m, t in zip(mine, theirs, strict=True) if not (m.missing or t.missing)]
        ahead = sum(m.value - t.value for m, t in both) / len(both)
        assert scored[c.generation, c.slot] == pytest.approx(best.score + ahead)
        break
    else:
        pytest.fail("no candidate after the first generation missed an item")


def test_a_judge_that_never_gives_a_verdict_ends_the_search(tmp_path: Path, chats: Path) -> None:
    judge = Judge(lambda messages: {"reason": "so good", "points": 11})
    with pytest.raises(TaskError, match=r"no valid verdict on 6 of 6"):
        driving.run(asking(chats), name="a", runs_dir=tmp_path, models=judge.models)
    refused = [text for text in judge.asked if "That was refused" in text]
    repairs = sum(judge.asked[text] for text in refused)
    assert repairs == len(judge.asked) - len(refused), "one repair an answer"


def test_what_was_refused_twice_is_not_asked_again(tmp_path: Path, chats: Path) -> None:
    """In no life of a search; but where most was, its judge may have been mended."""
    sent, replies = Counter[str](), Counter[str]()

    def says(messages: list) -> Any:
        said = messages[1].text
        sent[said] += 1
        if 12 <= sum(sent.values()) < 16:
            raise ConnectionResetError("gone")
        replies[said] += 1
        hard = "What is 3?" in said
        return "no" if hard else points(messages[:2])

    judge, lives = Judge(says), 1
    settings = asking(chats, 6, max_retries=0, at_once=1)
    go: Any = lambda: driving.run(settings, name="a", runs_dir=tmp_path, models=judge.models)  # noqa: E731
    while lives < 12:
        try:
            go()
            break
        except RunFailed:
            lives += 1
            go = lambda: driving.resume("a", runs_dir=tmp_path, models=judge.models)  # noqa: E731
    assert lives > 1
    refused = [n for said, n in replies.items() if "What is 3?" in said]
    assert refused
    assert set(refused) == {1}
    never = Judge(lambda messages: "no")
    with pytest.raises(TaskError, match="no valid verdict"):
        driving.run(asking(chats), name="b", runs_dir=tmp_path / "b", models=never.models)
    mended = Judge()
    row = driving.resume("b", runs_dir=tmp_path / "b", models=mended.models)
    assert row.status == "done"
    assert row.card.answer.score is not None


def test_what_the_ends_verdicts_take_is_known_after_a_resume(tmp_path: Path, chats: Path) -> None:
    row = driving.run(asking(chats), name="a", runs_dir=tmp_path, models=Judge().models)
    refs = [ItemRef("chats", 90 + n, str(n)) for n in range(4)]
    taskset: Any = SimpleNamespace(
        refs=lambda part: refs if part == "sealed" else [],
        judged={"chats": SimpleNamespace(settings=SimpleNamespace(twice=0.0), verdicts=len)},
    )
    with Ledger(tmp_path / LEDGER) as ledger:
        spent = ledger.call_totals(row.id)
        judges = Judges(Any, taskset, ledger, row.id, merges=lambda: 3)
        tokens, usd = judges.kept_back()
        assert Judges(Any, taskset, ledger, "", merges=lambda: 3).kept_back() == (0, 0.0)
    each = (spent["tokens_in"] + spent["tokens_out"]) / spent["calls"]
    assert tokens == math.ceil(3 * len(refs) * each)
    assert usd == 0.0


def test_at_once_is_of_all_evaluations(tmp_path: Path, chats: Path) -> None:
    lock, now, most = threading.Lock(), Counter[str](), Counter[str]()

    def says(messages: list) -> Any:
        with lock:
            now["asked"] += 1
            most["asked"] = max(most["asked"], now["asked"])
        time.sleep(0.002)
        with lock:
            now["asked"] -= 1
        return points(messages)

    settings = asking(chats, 5, at_once=2)
    worker = settings.worker.model_copy(update={"count": 3})
    settings = settings.model_copy(update={"worker": worker})
    row = driving.run(settings, name="a", runs_dir=tmp_path, models=Judge(says).models)
    assert row.status == "done"
    assert most["asked"] == 2


def test_a_try_without_a_verdict_is_counted_as_one() -> None:
    """The more were tried, the further ahead the luckiest is, whatever verdicts they miss."""
    rng = np.random.default_rng(3)
    refs = tuple(ItemRef("chats", n, str(n)) for n in range(60))
    places = tuple(range(len(refs)))
    task = ScoredTask(
        "chats", 1.0, "m", "none", True, "generate_until", None, "p", refs, places, places,
        objective="chats",
    )  # fmt: skip
    objective = Objective("chats", 1.0, True, ("chats",))
    taskset = TaskSet((task,), (objective,), judged={"chats": cast(Any, None)})
    drawn = {n: rng.random(60) for n in ["rival", *map(str, range(40))]}
    drawn["0"] = np.clip(drawn["rival"] + rng.normal(0.13, 0.4, 60), 0, 1.5)
    known = {n: dict(zip(refs, map(ItemResult, v.tolist()), strict=True)) for n, v in drawn.items()}
    cands = [Candidate(1, n, "cma_es", "", None, str(n), "scored") for n in range(40)]
    rival = Candidate(0, 0, UNIFORM, "", None, "rival", "scored")
    search: Any = SimpleNamespace(
        taskset=taskset, item_results=lambda recipe: known[recipe],
        config=SimpleNamespace(search=SimpleNamespace(seed=1)),
    )  # fmt: skip

    def answer(tried: list[Candidate]) -> Candidate:
        return beyond_noise(search, cands[0], tried, [rival])[0]

    assert answer(cands[:1]) is cands[0]
    assert answer(cands) is rival
    for n in range(1, 40):
        del known[str(n)][refs[n]]
    assert answer(cands) is rival, "each misses one of sixty"


@pytest.mark.parametrize("limit", ["max_tokens", "max_cost_usd"])
def test_verdicts_are_within_the_budget(tmp_path: Path, chats: Path, limit: str) -> None:
    prices = {"scripted": (1.0, 1.0)}
    most = {"max_tokens": 50_000, "max_cost_usd": 0.05}[limit]
    settings = asking(chats, 12, max_tokens=200, twice=0.2)
    budget = settings.budget.model_copy(update={limit: most, "prices": prices})
    settings = settings.model_copy(update={"budget": budget})
    judge = Judge()
    row = driving.run(settings, name="a", runs_dir=tmp_path, models=judge.models)
    assert row.stop_reason == limit.removeprefix("max_").removesuffix("_usd")
    with Ledger(tmp_path / LEDGER) as ledger:
        spent = ledger.call_totals(row.id)
        done = ledger.tally(row.id).evaluations
    used = spent["cost_usd"] if "cost" in limit else spent["tokens_in"] + spent["tokens_out"]
    assert 0.5 * most < used <= most
    assert done > 2
    more = {f"budget.{limit}": most * 100}
    again = driving.resume("a", runs_dir=tmp_path, overrides=more, models=judge.models)
    assert again.stop_reason == "budget"
    assert set(judge.asked.values()) <= {1, 2}, "twice is what was drawn to be"


@pytest.mark.slow
def test_sealed_conversations_are_judged_once_in_the_end(tmp_path: Path) -> None:
    """And what they take is kept back from the budget."""
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "".join(json.dumps({"id": n, "turns": [f"What is {n}?"]}) + "\n" for n in range(90))
    )
    order: list[int] = []

    def says(messages: list) -> Any:
        order.append(int(re.findall(r"What is (\d+)\?", messages[-1].text)[0]))
        return points(messages)

    judge, settings = Judge(says), asking(file, 60, max_tokens=200)
    budget = settings.budget.model_copy(update={"max_tokens": 600_000})
    settings = settings.model_copy(update={"budget": budget})
    row = driving.run(settings, name="a", runs_dir=tmp_path, models=judge.models)
    assert row.stop_reason == "tokens"
    assert set(judge.asked.values()) == {1}
    with Ledger(tmp_path / LEDGER) as ledger:
        sealed = row.facts["items"]["chats"]["sealed"]
        done = ledger.tally(row.id).evaluations
        spent = ledger.call_totals(row.id)
    assert row.card.sealed
    assert not row.card.lost
    times = Counter(order)
    last = [n for n, count in times.items() if count < done]
    assert len(last) == sealed
    begun = min(order.index(n) for n in last)
    assert set(order[begun:]) == set(last), "none of them before the end"
    assert 400_000 < spent["tokens_in"] + spent["tokens_out"] <= 600_000


def test_a_judges_noise_is_measured(tmp_path: Path, chats: Path) -> None:
    import random

    rng = random.Random(1)

    def noisy(messages: list) -> Any:
        shift = rng.gauss(0, 0.5)
        return {"reason": "", "points": min(10, max(1, points(messages)["points"] + shift))}

    judge = Judge(noisy)
    row = driving.run(asking(chats, twice=0.5), name="a", runs_dir=tmp_path, models=judge.models)
    with Ledger(tmp_path / LEDGER) as ledger:
        found = run_summary(ledger, row)["judges"]["chats"]
    asked = len(judge.asked)
    assert found["verdicts"] == asked
    assert 0.4 < found["twice"] / asked < 0.6
    assert found["twice"] == sum(count == 2 for count in judge.asked.values())
    assert 0.35 < found["noise"] < 0.6


@pytest.mark.parametrize(("algorithm", "noise"), [("margins", 0.0), ("margins", 3), ("auto", 3)])
def test_where_verdicts_are_mostly_chance_the_search_goes_by_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, noise: float
) -> None:
    """Noise of a judge is chance in what items show, whoever drew it."""
    import random

    file, rng = tmp_path / "chats.jsonl", random.Random(5)
    rows = [{"id": n, "turns": [f"What is {n}?"]} for n in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judged(messages: list) -> Any:
        said = points(messages)["points"] + rng.gauss(0, noise)
        return {"reason": "", "points": min(10.0, max(1.0, said))}

    models_of_items: list[bool] = []
    found = margins.prospect_of

    def seen(table: Table, worst: Worst | None = None) -> margins.Prospect:
        prospect = found(table, worst)
        models_of_items.append(prospect.by_item)
        return prospect

    monkeypatch.setattr(margins, "prospect_of", seen)
    settings = asking(file, 12, at_once=1)
    search = settings.search.model_copy(update={"algorithm": algorithm, "population": None})
    settings = settings.model_copy(update={"search": search})
    driving.run(settings, name="a", runs_dir=tmp_path, models=Judge(judged).models)
    assert models_of_items
    assert set(models_of_items) == {noise == 0.0}


def test_answers_are_compared_in_both_orders(tmp_path: Path, chats: Path) -> None:
    """A judge that always prefers what stands first has said nothing."""
    against = tmp_path / "baseline.jsonl"
    answers = [f"level {0.5:.6f}"] * TURNS
    against.write_text(
        "".join(json.dumps({"id": n, "answers": answers}) + "\n" for n in range(ITEMS))
    )
    first = Judge(lambda messages: {"reason": "", "better": "A"})
    row = driving.run(
        asking(chats, 8, against=str(against)), name="a", runs_dir=tmp_path, models=first.models
    )
    assert {r.value for rows in results_of(tmp_path, "a").values() for r in rows} == {0.5}

    def fair(messages: list) -> Any:
        found = re.findall(r"<answer \w+>\nlevel ([\d.]+)", messages[-1].text)
        a, b = map(float, found)
        return {"reason": "", "better": "A" if a > b else "B" if b > a else "tie"}

    settings = asking(chats, 8, against=str(against))
    row = driving.run(settings, name="b", runs_dir=tmp_path / "b", models=Judge(fair).models)
    values = {r.value for rows in results_of(tmp_path / "b", "b").values() for r in rows}
    assert values <= {0.0, 1.0}
    assert len(values) == 2
    assert row.card.answer.score == max(
        c.score for c in Ledger(tmp_path / "b" / LEDGER).candidates(row.id)
    )


def test_fewer_points_may_be_better(tmp_path: Path, chats: Path) -> None:
    """Beside a perplexity, of which less is better too."""
    tasks = [{"name": "text", "metric": "word_perplexity,none", "weight": 0.01}]
    settings = asking(chats, 10, tasks, higher_is_better=False, scale=[0, 10])
    judge = Judge(lambda m: {"reason": "", "points": round(10 - 10 * level(m[-1].text), 2)})
    row = driving.run(settings, name="a", runs_dir=tmp_path, models=judge.models)
    best = row.card.answer
    with Ledger(tmp_path / LEDGER) as ledger:
        scored = [c for c in ledger.candidates(row.id) if c.score is not None]
    assert best.tasks["chats"] < max(dict(c.tasks)["chats"] for c in scored)
    assert best.score == pytest.approx(-best.tasks["chats"] - 0.01 * best.tasks["text"])


def test_a_real_server_judges(tmp_path: Path, chats: Path) -> None:
    """Over HTTP, with faults that pass; its key is read where the search is and is kept nowhere."""
    faults = iter([Fault("429"), Fault("503"), Fault("cut")])
    fault = {7: faults, 20: faults, 41: faults}
    seen = 0

    def answer(body: dict) -> Any:
        nonlocal seen
        seen += 1
        if seen in fault:
            return next(fault[seen])
        return {"reason": "", "points": round(1 + 9 * level(body["messages"][-1]["content"]), 2)}

    with ScriptedServer(answer) as server:
        judge = {"base_url": server.base_url, "model": "openai:scripted"}
        row = driving.run(asking(chats, 5, **judge), name="a", runs_dir=tmp_path)
        assert row.status == "done"
        request = server.requests[0].body
    assert request["response_format"]["json_schema"]["schema"]["properties"]["points"] == {
        "type": "number", "minimum": 1.0, "maximum": 10.0,
    }  # fmt: skip
    assert not any(r.missing for rows in results_of(tmp_path, "a").values() for r in rows)


def test_doctor_says_what_a_judge_will_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    chats, count = tmp_path / "chats.jsonl", 120
    chats.write_text("".join(json.dumps({"turns": [f"What is {n}?"]}) + "\n" for n in range(count)))
    server = {"model": "openai:own", "base_url": "http://127.0.0.1:9/v1"}

    def told(judge: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any]:
        body = {
            "genome": {"models": ["a", "b"], "base_model": "base", "merge_method": "linear"},
            "tasks": [{"name": "chats", "judge": {"conversations": str(chats), **judge}}],
            "search": {"sealed_share": 0.5},
            "worker": {"kind": "fake"},
            "budget": {"max_evaluations": 10, **budget},
        }
        file = tmp_path / "config.yml"
        file.write_text(json.dumps(body))
        _, (found,) = forecast(file)
        return found

    found = told({"model": "openai:gpt-4o-mini", "twice": 0}, {"max_tokens": 10**6})
    assert found["ok"]
    [each] = re.findall(r"is asked (\d+) questions a candidate \(0% of them twice", found["detail"])
    assert re.search(r"up to \d+ tokens, up to [\d.e-]+ dollars", found["detail"])
    merges, tokens = map(int, re.findall(r"(\d+) merges.* (\d+) tokens are", found["detail"])[0])
    assert f"the end asks up to {merges * (count - int(each))} more" in found["detail"]
    assert f"kept back: {tokens / 10**6:.0%} of budget.max_tokens" in found["detail"]
    assert "(fewer once verdicts are known)" in found["detail"]
    found = told({"model": "openai:gpt-4o-mini", "twice": 0}, {"max_tokens": tokens - 1})
    assert not found["ok"]
    assert found["remedy"].startswith("raise that limit")
    found = told({**server, "twice": 0.5}, {})
    assert (
        f"is asked {round(int(each) * 1.5)} questions a candidate (50% of them twice)"
        in found["detail"]
    )
    assert "at a price that is not known" in found["detail"]
    assert "kept back: nothing, since no limit" in found["detail"]
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="too many values"):  # the key that is missing, too
        told({"model": "openai:gpt-4o-mini"}, {})
    with pytest.raises(ConfigError, match=r"there is no /no/such\.jsonl"):
        told({**server, "conversations": "/no/such.jsonl"}, {})


@pytest.mark.parametrize("refused", [Fault("400"), "I will not judge that."])
def test_what_a_server_refuses_for_good_is_missing_with_a_reason_in_every_life(
    tmp_path: Path, chats: Path, refused: Any
) -> None:
    """Of two judged tasks, one has a question that its server turns down; the other has not."""
    asked, down = Counter[str](), False
    other = tmp_path / "other.jsonl"
    other.write_text('{"turns": ["Who are you?"]}\n{"turns": ["Who am I?"]}\n')

    def answer(body: dict) -> Any:
        said = body["messages"][1]["content"]
        asked[said] += 1
        if down or sum(asked.values()) == 30:
            return Fault("503")
        if "What is 3?" in said:
            return refused
        return {"reason": "", "points": round(1 + 9 * level(said), 2)}

    with ScriptedServer(answer) as server:
        # One question at a time, of both tasks: else the second turn may be refused first.
        judge = {"model": "openai:scripted", "base_url": server.base_url, "twice": 0, "at_once": 1}
        more = [{"name": "other", "judge": judge | {"conversations": str(other)}}]
        settings = asking(chats, 5, more, **judge, max_retries=0)
        kept = Ledger.save_unjudged

        def then_down(*args: Any, **kwargs: Any) -> None:
            nonlocal down
            kept(*args, **kwargs)
            down = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "save_unjudged", then_down)
            with pytest.raises(RunFailed, match="does not answer"):
                driving.run(settings, name="a", runs_dir=tmp_path)
        [said] = [said for said in asked if "What is 3?" in said and "And twice" not in said]
        before, down = asked[said], False
        assert driving.resume("a", runs_dir=tmp_path).status == "done"
    assert asked[said] == before
    with Ledger(tmp_path / LEDGER) as ledger:
        found = run_summary(ledger, ledger.run("a"))["judges"]
        reasons = {row["reason"] for row in ledger.records("SELECT * FROM unjudged WHERE final")}
    assert found["other"]["unjudged"] == 0
    # The first question to a server may be asked again with its schema written out after it.
    questions = [q for q in asked if not any(q != said and q.startswith(said) for said in asked)]
    assert found["chats"]["unjudged"] == sum("What is 3?" in said for said in questions)
    assert any(
        ("HTTP 400" if refused != "I will not judge that." else "JSON") in r for r in reasons
    )


@pytest.mark.parametrize(
    ("lines", "judge", "words"),
    [
        ('{"turns": ["a"]}\n{"turns": ["a"]}', {}, "line 2 of .* asks the same as line 1"),
        ('{"turns": []}', {}, 'needs "turns"'),
        ("[1]", {}, "no JSON object"),
        ("{", {}, "is no JSON"),
        ("", {}, "holds no conversation"),
        ('{"turns": ["a"], "references": ["b", "c"]}', {}, "2 references and 1 turns"),
        ('{"turns": ["a"]}', {"conversations": "/no/such.jsonl"}, "there is no /no/such.jsonl"),
        ('{"turns": ["a"]}', {"scale": [5, 1]}, "must rise"),
        ('{"turns": ["a"]}', {"pointz": 1}, "did you mean"),
        ('{"turns": ["a"]}', {"model": "nobody:else"}, "nobody"),
        ('{"turns": ["a"]}', {"prompt": "PROMPT"}, "unknown variable {{anser}}"),
        ('{"turns": ["a"]}', {"against": "CHATS"}, 'needs "answers"'),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, lines: str, judge: dict, words: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(lines)
    (tmp_path / "p.md").write_text("{{question}} {{anser}} {{least}} {{most}}")
    places = {"PROMPT": str(tmp_path / "p.md"), "CHATS": str(file)}
    judge = {key: places.get(str(value), value) for key, value in judge.items()}
    with pytest.raises(ConfigError, match=words):
        driving.run(asking(file, **judge), runs_dir=tmp_path / "runs")
