"""What the tools do, what they refuse, and agents that search by them alone."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from agentmerge import MergeToolkit, SearchConfig
from agentmerge.agents.ladder import release
from agentmerge.contracts.advice import StructuralMove
from agentmerge.errors import LeaseHeld, NotFound, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.report.summary import best_recipe, run_summary
from agentmerge.search.budget import items_left
from agentmerge.search.failing import failing_items
from agentmerge.search.probes import Release
from agentmerge.search.structure import restructure
from agentmerge.search.tools import tools_of
from agentmerge.session import driving
from agentmerge.testing.scripted import scripted_chat_model

GENOME = "[50, 40, 30, 20]"


def call(name: str, **arguments) -> AIMessage:
    return AIMessage("", tool_calls=[{"id": f"c-{name}", "name": name, "args": arguments}])


def climbing(messages) -> AIMessage:
    """A small search by tools alone: look, then one step an axis from the best so far."""
    answers = [json.loads(m.text) for m in messages if isinstance(m, ToolMessage)]
    if not answers:
        return call("inspect_parents")
    scored = [a for a in answers if "genome" in a]
    if len(scored) >= 6:
        return AIMessage(f"best {max(scored, key=lambda a: a['score'])['id']}")
    best = max(scored, key=lambda a: a["score"])["genome"] if scored else [50] * 4
    step = len(scored) - 1
    genome = [min(100, g + 15) if i == step % 4 else g for i, g in enumerate(best)]
    return call("merge_and_evaluate", recipe=json.dumps(genome if scored else best))


def test_an_agent_searches_by_tools_alone(toolkit) -> None:
    agent = create_agent(scripted_chat_model(climbing), toolkit.get_tools())
    said = agent.invoke({"messages": [("user", "find a good merge")]})["messages"]
    tried = [json.loads(m.text) for m in said if isinstance(m, ToolMessage) and "genome" in m.text]
    assert said[-1].text.startswith("best ")
    row = toolkit.search.ledger.run("tools")
    assert best_recipe(toolkit.search.ledger, row)["score"] >= max(t["score"] for t in tried)
    assert (
        run_summary(toolkit.search.ledger, row)["evaluations"]["total"]
        == len({t["id"] for t in tried}) + 3
    )


def test_any_tool_node_takes_them(toolkit) -> None:
    chat = scripted_chat_model(climbing)

    def model(state: MessagesState):
        return {"messages": [chat.invoke(state["messages"])]}

    def after(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(MessagesState).add_node("model", model)
    graph.add_node("tools", ToolNode(toolkit.get_tools()))
    graph.add_edge(START, "model").add_conditional_edges("model", after)
    graph.add_edge("tools", "model")
    said = graph.compile().invoke({"messages": [("user", "go")]})["messages"]
    assert said[-1].text.startswith("best ")


def test_a_recipe_may_be_yaml_a_genome_or_an_object(ask, toolkit) -> None:
    recipe = toolkit.search.space.recipe((0.5, 0.4, 0.3, 0.2))
    first = json.loads(ask("merge_and_evaluate", recipe=GENOME)[1])
    for other in (recipe.to_yaml(), [50, 40, 30, 20], recipe.to_dict()):
        again = json.loads(ask("merge_and_evaluate", recipe=other)[1])
        assert again["known"]
        assert again["id"] == first["id"]
        assert again["evaluations_left"] == first["evaluations_left"]


def test_a_part_of_the_items_is_no_candidate(ask, toolkit) -> None:
    status, text = ask("merge_and_evaluate", recipe=GENOME, tasks=["one"], limit=7)
    found = json.loads(text)
    assert (status, found["items"], found["paid_items"]) == ("success", {"one": 7}, 7)
    assert (
        json.loads(ask("merge_and_evaluate", recipe=GENOME, tasks=["one"], limit=9)[1])[
            "paid_items"
        ]
        == 2
    ), "items are nested, so the first seven were paid for"
    assert json.loads(ask("list_candidates")[1])["candidates"] == []


@pytest.mark.parametrize("limits", [{"max_items": 500}, {"max_evaluations": 3}])
def test_parts_of_the_items_are_in_the_budget(fake_config: str, tmp_path: Path, limits) -> None:
    body = yaml.safe_load(fake_config) | {"budget": {"max_evaluations": 19} | limits}
    config = SearchConfig.from_text(yaml.safe_dump(body))
    with MergeToolkit(config, runs_dir=tmp_path) as kit:
        merge = next(t for t in kit.get_tools() if t.name == "merge_and_evaluate")
        most = items_left(kit.search)  # what the end may ask is kept back
        assert 90 < most <= 240
        asks = [{"recipe": json.dumps([n, 9, 9, 9]), "limit": 5 + n % 3} for n in range(60)]
        with ThreadPoolExecutor(8) as threads:
            said = [*threads.map(merge.invoke, asks)]
        paid = sum(sum(json.loads(t)["items"].values()) for t in said if t.startswith("{"))
        left = items_left(kit.search)
        assert paid + left == most
        assert left < 10
        assert sum("more than this search's budget has left" in t for t in said) > 20
        first = next(a for a, t in zip(asks, said, strict=True) if t.startswith("{"))
        assert merge.invoke(first).startswith("{"), "what was paid for is there for nothing"
        assert items_left(kit.search) == left


def test_genomes_are_points_of_the_space_whose_axes_are_shown(ask, toolkit) -> None:
    search = toolkit.search
    even = [50 if axis.model == "north" else 40 for axis in search.present.axes]
    for genome in (even, [50, 40, 30, 20]):
        ask("merge_and_evaluate", recipe=genome)
    restructure(search, 0, StructuralMove("granularity", "4", "to see"), approved=True)
    ask("merge_and_evaluate", recipe=[60] * search.present.dimensions)
    listed = json.loads(ask("list_candidates")[1])
    assert len(listed["axes"]) == search.present.dimensions != 4
    found = {tuple(row["genome"]) for row in listed["candidates"] if "genome" in row}
    assert {len(genome) for genome in found} == {len(listed["axes"])}
    assert len(listed["candidates"]) == 3
    assert len(found) == 2, "the uneven one is no point of the coarser space"


def test_the_searchs_own_agents_see_what_the_ladder_releases(toolkit) -> None:
    """Whoever sees exact scores of the same items fits them, by a prompt or by a tool."""
    search = toolkit.search
    open_to_all = {tool.name: tool for tool in toolkit.get_tools()}
    own = {tool.name: tool for tool in tools_of(search, None, "critic", lambda a, b: 0.2)}
    tries = [json.dumps([n, 100 - n, n, 40]) for n in range(0, 100, 9)]
    said = [json.loads(own["merge_and_evaluate"].invoke({"recipe": r})) for r in tries]
    truth = json.loads(open_to_all["list_candidates"].invoke({"count": 50}))["candidates"]
    shown = json.loads(own["list_candidates"].invoke({"count": 50}))["candidates"]
    raw = {row["id"]: row["score"] for row in truth}
    assert len({row["score"] for row in shown}) < len(set(raw.values()))
    released = search.history(space=search.present)
    expected = {
        f"{o.generation}.{o.slot}": round(o.score, 4)
        for o in release(released, lambda a, b: 0.2).entries
    }
    assert {row["id"]: row["score"] for row in shown} == expected
    assert {row["id"]: row["score"] for row in said} == expected
    one, other = sorted(raw, key=raw.__getitem__)[-2:]
    told = json.loads(own["compare"].invoke({"a": one, "b": other}))
    assert "cannot be told apart" in told["note"]
    assert "tasks" not in told
    assert "tasks" in json.loads(open_to_all["compare"].invoke({"a": one, "b": other}))
    low, high = min(raw, key=raw.__getitem__), max(raw, key=raw.__getitem__)
    assert "b_minus_a" in json.loads(own["compare"].invoke({"a": low, "b": high}))
    part = json.loads(own["merge_and_evaluate"].invoke({"recipe": tries[3], "limit": 25}))
    exact = json.loads(open_to_all["merge_and_evaluate"].invoke({"recipe": tries[3], "limit": 25}))
    assert part["items"] == exact["items"]
    assert all(abs(part["tasks"][t] - exact["tasks"][t]) <= 0.06 for t in exact["tasks"])
    assert part["tasks"] != exact["tasks"]


def test_compare_shows_what_was_lost(ask) -> None:
    ask("inspect_parents")
    found = json.loads(ask("compare", a="north", b="south")[1])
    back = json.loads(ask("compare", a="south", b="north")[1])
    for row, mirrored in zip(found["tasks"], back["tasks"], strict=True):
        assert row["lost_by_b"]["count"] == mirrored["gained_by_b"]["count"]
        gap = (row["gained_by_b"]["count"] - row["lost_by_b"]["count"]) / row["items"]
        assert row["b"] - row["a"] == pytest.approx(gap, abs=2e-4)
    assert found["b_minus_a"]["score"] == pytest.approx(-back["b_minus_a"]["score"])


def test_parents_of_real_weights(real_config: Path, tmp_path: Path) -> None:
    with MergeToolkit(real_config, runs_dir=tmp_path) as kit:
        tools = {tool.name: tool for tool in kit.get_tools()}
        found = json.loads(tools["inspect_parents"].invoke({}))
        again = json.loads(tools["inspect_parents"].invoke({}))
        failed = json.loads(tools["failing_items"].invoke({"candidate": "expert-sort", "count": 4}))
        limited = tools_of(kit.search, 0, "critic", kit.search.noise)
        coarse, none = (
            [failing_items(kit.search, parent, 20, Release(kit.search, lambda a, b, at=at: at))
             for parent in ("expert-shift", "expert-sort")]
            for at in (0.0, 9.0)
        )  # fmt: skip
    assert found["parts"] == again["parts"], "what was measured once is remembered"
    assert [part["part"] for part in found["parts"]][-1] == "outside the layers"
    for part in found["parts"]:
        assert all(0 < length < 1 for length in part["length"].values())
        assert all(-1 <= cosine <= 1 for cosine in part["cosine"].values())
    assert len(failed["items"]) == 4 < failed["kept"]
    assert 0 < sum(failed["faults"].values()) < failed["kept"], "a choice has no such fault"
    most = failed["kept"] // 4
    assert most / 2 < len(coarse[1]["items"]) <= most, "how many come tells not how many fail"
    assert not coarse[1].keys() & {"kept", "faults"}
    tied = [found for found in none if "cannot be told apart" in found["note"]]
    assert tied
    assert not any(found["items"] for found in tied)
    for item in failed["items"]:
        assert item["asks"]
        assert item["answer"] != item["right"]
    assert "failing_items" not in {tool.name for tool in limited}, "texts only where one lets them"
    only = {row["task"]: row["only"] for row in found["items"]}
    assert only["agentmerge_demo_shift"]["expert-shift"]["count"] > 10
    assert only["agentmerge_demo_shift"]["expert-sort"]["count"] == 0


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("merge_method: linear\nmodels: [{model: /etc/passwd}, {model: north}]", "is no model of"),
        ("merge_method: linear\nmodels: [{model: org/other}, {model: north}]", "is no model of"),
        ("merge_method: linear\ntokenizer_source: /etc\nmodels: []", "'tokenizer_source' cannot"),
        ("merge_method: linear\nchat_template: '{{ x }}'\nmodels: []", "'chat_template' cannot"),
        ("a: &a [1]\nmodels: *a", "aliases"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("merge_method: magic\nmodels: [{model: north}]", "magic"),
        ("just words", "a recipe is a mapping"),
        ("[1, 2]", "has 2 numbers; give 4"),
        ("[1, 2, 3, NaN]", "nan in the genome"),
        ("[1, 2, 3, 1e999]", "inf in the genome"),
        ("[1, 2, 3, true]", "True in the genome"),
        ("[1, 2, 3, 101]", "101 in the genome"),
        ("[[1, 2], 2, 3, 4]", "in the genome"),
        ("[" * 5000, "not a JSON list"),
        ("{" * 5000, "not YAML"),
        ("x" * 30_000, "at most 20000 characters"),
        ("", "a recipe is a mapping"),
        ("merge_method: linear\nmodels: 7", "list"),
        ("merge_method: linear\nmodels: [{model: north, parameters: {weight: .nan}}]", "nan"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_text_is_data(ask, recipe: str, says: str) -> None:
    status, text = ask("merge_and_evaluate", recipe=recipe)
    assert status == "error"
    assert says in text
    assert len(text) < 400


def test_wrong_arguments_come_back_as_sentences(ask) -> None:
    for name, arguments, says in [
        ("merge_and_evaluate", {}, "recipe: Field required"),
        ("merge_and_evaluate", {"recipe": GENOME, "limit": 0}, "greater than or equal to 1"),
        ("merge_and_evaluate", {"recipe": GENOME, "tasks": ["three"]}, "no task 'three'"),
        ("list_candidates", {"count": 10**9}, "less than or equal"),
        ("compare", {"a": "9.9", "b": "north"}, "no scored candidate '9.9'"),
    ]:
        status, text = ask(name, **arguments)
        assert (status, says in text) == ("error", True), text


def test_the_budget_is_hard_even_in_parallel(toolkit) -> None:
    merge = next(t for t in toolkit.get_tools() if t.name == "merge_and_evaluate")
    budget = toolkit.search.config.budget.max_evaluations
    genomes = [json.dumps([n, n, 50, 50]) for n in range(budget + 11)]
    with ThreadPoolExecutor(8) as threads:
        said = [*threads.map(lambda g: merge.invoke({"recipe": g}), genomes)]
    assert sum(re.match("all .* are used", text) is not None for text in said) == 11
    ids = [json.loads(text)["id"] for text in said if text.startswith("{")]
    assert len(set(ids)) == budget


def test_the_async_twin_does_the_same(toolkit) -> None:
    merge = next(t for t in toolkit.get_tools() if t.name == "merge_and_evaluate")

    async def both() -> list[str]:
        return await asyncio.gather(*(merge.ainvoke({"recipe": r}) for r in (GENOME, "[9,9,9,9]")))

    assert all("score" in json.loads(text) for text in asyncio.run(both()))


def test_a_run_of_tools_goes_on_and_becomes_a_search(fake_config: str, tmp_path: Path) -> None:
    config = SearchConfig.from_text(fake_config)
    with MergeToolkit(config, name="t", runs_dir=tmp_path) as kit:
        kit.get_tools()[0].invoke({"recipe": GENOME})
        with pytest.raises(LeaseHeld):
            MergeToolkit(name="t", runs_dir=tmp_path)
    with MergeToolkit(name="t", runs_dir=tmp_path) as kit:
        assert json.loads(kit.get_tools()[0].invoke({"recipe": GENOME}))["known"]
    with Ledger(tmp_path / LEDGER) as ledger:
        assert ledger.run("t").stop_reason == "closed"
    row = driving.resume("t", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        operators = {c.operator for c in ledger.candidates(row.id)}
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert {"probe", "cma_es"} <= operators
    with MergeToolkit(name="t", runs_dir=tmp_path) as kit:
        assert kit.get_tools()[0].invoke({"recipe": "[1, 2, 3, 4]"})
    other = SearchConfig.from_text(fake_config.replace("limit: 40", "limit: 20"))
    with pytest.raises(UserError, match=r"is another config's.*choose another name"):
        MergeToolkit(other, name="t", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        assert ledger.run("t").stop_reason == "budget", "tools leave a search where it stood"
    with pytest.raises(NotFound, match="give a config"):
        MergeToolkit(name="other", runs_dir=tmp_path)
