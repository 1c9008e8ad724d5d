"""Conversations played on a real model, turn by turn, and judged by a real server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from lm_eval.models.utils import normalize_gen_kwargs

from agentmerge.config import JudgeSettings, SearchConfig, TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import TaskError
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.judged import ANSWER_TOKENS, prompt_file
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.testing import ScriptedServer
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.hf import HfWorker

LENGTH = 5


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> dict[str, Path]:
    return tiny.write_family(tmp_path_factory.mktemp("family"), template=tiny.TEMPLATE)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats") / "chats"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"turns": [f"q{n} what?", "and then?", "why?"][: 1 + n % 3]} for n in range(9)
    ]
    rows[0]["system"] = "be brief"
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spec_of(family: dict[str, Path], chats: Path, kind: str = "hf", **judge: Any) -> WorkerSpec:
    own = {"model": "openai:x", "generation": {"max_gen_toks": LENGTH}} | judge
    config = TasksConfig(
        tasks=({"name": "chats", "judge": own},), task_search_path=(str(chats.parent),)
    )
    parents = tuple((name, str(path)) for name, path in family.items())
    return WorkerSpec(kind, parents, "base", config, "float32", 4, options={"base": "base"})


def merged() -> Recipe:
    return Recipe.of_model("b", 2).canonical(2)


def test_each_turn_is_asked_after_the_models_own_answers(
    family: dict[str, Path], chats: Path
) -> None:
    """Word for word what transformers says to the rendered chat, in any order and company."""
    spec = spec_of(family, chats)
    worker = HfWorker(spec)
    worker.load(merged())
    refs = tasks_for(spec).refs()
    results = worker.score(refs)
    judged = tasks_for(spec).judged["chats"]
    for ref, result in zip(refs, results, strict=True):
        conversation = judged.conversations[ref.index]
        assert len(result.answers) == len(conversation.turns)
        text = "<s>[s]be brief#" if conversation.system else "<s>"
        for turn, answer in zip(conversation.turns, result.answers, strict=True):
            text += f"[u]{turn}#[a]"
            said = tiny.raw(family["b"], [text.removeprefix("<s>")], LENGTH)[0]
            for token in ("<pad>", "<s>", "<unk>"):
                said = said.replace(token, "")
            assert answer == said.split("</s>")[0], (conversation.id, turn)
            text += f"{answer}#"
    assert [r.answers for r in worker.score(refs[::-1])] == [r.answers for r in results[::-1]]
    kept = [text for text, _ in worker._lm._ids if "and then" in text]
    assert not kept, "prompts with a candidate's own words do not pile up"


@pytest.mark.slow
def test_a_fresh_process_says_the_same(family: dict[str, Path], chats: Path) -> None:
    spec = spec_of(family, chats, "disk")
    refs = tasks_for(spec).refs()[:2]
    here, there = HfWorker(spec_of(family, chats)), DiskWorker(spec)
    try:
        for worker in (here, there):
            worker.load(merged())
        assert [r.answers for r in there.score(refs)] == [r.answers for r in here.score(refs)]
    finally:
        there.close()


@pytest.mark.parametrize(
    "changed",
    [{"model": "openai:y"}, {"scale": [0, 5]}, {"generation": {"max_gen_toks": 6}},
     {"temperature": 0.5}, {"answer_chars": 500}, {"prompt": "other.md"}],
)  # fmt: skip
def test_how_it_is_asked_and_judged_is_in_the_protocol(
    family: dict[str, Path], chats: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    if "prompt" in changed:
        (tmp_path / "other.md").write_text("{{question}}{{answer}}{{least}}{{most}}")
        changed = {"prompt": str(tmp_path / "other.md")}
    one, other = (tasks_for(spec_of(family, chats, **own)).tasks[0] for own in ({}, changed))
    assert one.protocol_hash != other.protocol_hash
    assert one.items == other.items
    moved = {"base_url": "http://127.0.0.1:1/v1", "at_once": 9, "twice": 0.5, "timeout_s": 3}
    same = tasks_for(spec_of(family, chats, **moved)).tasks[0]
    assert same.protocol_hash == one.protocol_hash


def test_a_length_by_any_of_its_names_is_taken(family: dict[str, Path], chats: Path) -> None:
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        found = tasks_for(spec_of(family, chats, generation={name: 7})).judged["chats"]
        assert normalize_gen_kwargs(dict(found.generation))["max_gen_toks"] == 7
    with pytest.raises(TaskError, match=f"max_gen_toks {ANSWER_TOKENS} leaves no room"):
        tasks_for(spec_of(family, chats, generation={"until": "#"}))


def test_a_prompt_beside_the_conversations_is_taken(tmp_path: Path) -> None:
    own = JudgeSettings(model="openai:x")
    file = tmp_path / "chats.jsonl"
    file.write_text("")
    assert prompt_file(own, file).parent != tmp_path
    (tmp_path / "judge.md").write_text("")
    assert prompt_file(own, file) == prompt_file(own, tmp_path) == tmp_path / "judge.md"


def test_an_answer_that_fills_the_context_is_refused(family: dict[str, Path], chats: Path) -> None:
    with pytest.raises(TaskError, match=r"lower it in judge\.generation"):
        tasks_for(spec_of(family, chats, generation={"max_gen_toks": 96}))


def test_a_search_on_real_models_is_judged(
    family: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    """The judge sees what the model said, and what was judged is known from then on."""

    def points(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        answer = re.findall(r"<answer \w+>\n?(.*?)\n?</answer", text, re.DOTALL)
        return {"reason": "letters", "points": 1 + len(set(answer[0]) & set(tiny.LETTERS))}

    with ScriptedServer(points) as server:
        body = {
            "genome": {
                "models": [str(family["b"]), str(family["c"])],
                "base_model": str(family["base"]),
                "merge_method": "task_arithmetic",
            },
            "tasks": [
                {
                    "name": "chats",
                    "judge": {
                        "model": "openai:letters",
                        "base_url": server.base_url,
                        "generation": {"max_gen_toks": LENGTH},
                    },
                }
            ],
            "task_search_path": [str(chats.parent)],
            "search": {"algorithm": "random"},
            "budget": {"max_evaluations": 9},
        }
        config = SearchConfig.from_text(json.dumps(body))
        row = driving.run(config, name="a", runs_dir=tmp_path)
        asked = len(server.requests)
        found = driving.evaluate(Recipe.of_model(str(family["b"]), 2), config, runs_dir=tmp_path)
        assert len(server.requests) == asked, "known"
    with Ledger(tmp_path / LEDGER) as ledger:
        candidates = ledger.candidates(row.id)
        told = ledger.agreement(row.facts["judges"].values())
    assert asked == told.verdicts + told.twice
    assert len({c.score for c in candidates}) > 1
    parent = next(c for c in candidates if c.label == str(family["b"]))
    assert found["score"] == parent.score
