"""Finding, splitting and aggregating tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import ItemResult
from agentmerge.errors import CandidateFailed, TaskError
from agentmerge.evaluation.building import build_tasks
from agentmerge.evaluation.rendering import said
from agentmerge.evaluation.splitting import MIN_SEALED, choose_documents
from agentmerge.evaluation.tasks import TaskSet


def built(config: TasksConfig, check_built_ins: bool = False, **more: Any) -> TaskSet:
    return build_tasks(
        config,
        more.pop("tokenizer", None) or tiny.tokenizer(),
        template_source="a",
        check_built_ins=check_built_ins,
        **more,
    )


def write_yaml(path: Path, body: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(body))
    return path


QA = [{"q": f"{a}{b}=", "gold": a} for a in "abcdefghij" for b in "abcdefgh"]
EXACT: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "gold",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "metric_list": tiny.metric_list("exact_match"),
}


def qa(directory: Path, name: str, docs: list[dict[str, str]] | None = None) -> Path:
    return tiny.write_task(directory, name, docs or QA, **EXACT)


# --- names -----------------------------------------------------------------------------------


def test_two_files_that_claim_one_name(tmp_path: Path) -> None:
    one = qa(tmp_path / "one", "mine")
    two = qa(tmp_path / "two", "mine")
    config = TasksConfig(
        tasks=[{"name": "mine", "metric": "exact_match,none"}],
        task_search_path=(str(tmp_path / "one"), str(tmp_path / "two")),
    )
    with pytest.raises(TaskError, match="defined twice") as failed:
        built(config)
    assert str(one) in str(failed.value)
    assert str(two) in str(failed.value)
    # a path inside another finds the same file twice, which is no collision
    config = config.model_copy(
        update={"task_search_path": (str(tmp_path / "one"), str(tmp_path / "one" / ".." / "one"))}
    )
    assert len(built(config).tasks) == 1


def test_a_file_named_like_a_built_in_task(tmp_path: Path) -> None:
    """lm-eval would silently use one of the two; also where only a group reaches the name."""
    mine = qa(tmp_path / "plain", "kobest_copa")
    config = TasksConfig(
        tasks=[{"name": "kobest_copa", "metric": "exact_match,none"}],
        task_search_path=(str(tmp_path / "plain"),),
    )
    with pytest.raises(TaskError, match="lm-eval's own") as failed:
        built(config, check_built_ins=True)
    assert str(mine) in str(failed.value)
    assert "tasks/kobest/kobest_copa.yaml" in str(failed.value)

    qa(tmp_path / "group", "kobest_copa")
    write_yaml(
        tmp_path / "group" / "g.yaml",
        {"group": "my_group", "task": ["kobest_copa"], "aggregate_metric_list": GROUP_RULE},
    )
    config = TasksConfig(
        tasks=[{"name": "my_group", "metric": "exact_match,none"}],
        task_search_path=(str(tmp_path / "group"),),
    )
    with pytest.raises(TaskError, match="lm-eval's own"):
        built(config, check_built_ins=True)


def test_own_names_are_free_of_collisions(tmp_path: Path) -> None:
    qa(tmp_path, "mine")
    config = TasksConfig(
        tasks=[{"name": "mine", "metric": "exact_match,none"}], task_search_path=(str(tmp_path),)
    )
    assert built(config, check_built_ins=True).tasks[0].name == "mine"


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path) -> None:
    qa(tmp_path, "my_exact_task")
    (tmp_path / "broken.yaml").write_text("task: [")
    config = TasksConfig(tasks=["my_exact_tusk"], task_search_path=(str(tmp_path),))
    with pytest.raises(TaskError, match="did you mean 'my_exact_task'") as failed:
        built(config)
    assert "broken.yaml" in str(failed.value)
    with pytest.raises(TaskError, match="is not a directory"):
        built(TasksConfig(tasks=["x"], task_search_path=(str(tmp_path / "nowhere"),)))


def test_a_task_that_cannot_be_loaded_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the library looks for JSON in all folders below
    path = write_yaml(
        tmp_path / "t.yaml", {"task": "bad", "dataset_path": "json", "test_split": "test"}
    )
    with pytest.raises(TaskError, match="cannot be loaded") as failed:
        built(TasksConfig(tasks=["bad"], task_search_path=(str(tmp_path),)))
    assert str(path) in str(failed.value)


# --- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["acc,none", "exact_match,strict", "exact_match"])
def test_a_wrong_metric_is_answered_with_the_legal_ones(tasks_dir: Path, metric: str) -> None:
    config = tiny.tasks_config(tasks_dir, f"tiny_filtered={metric}")
    legal = "exact_match,first, exact_match,none" if "," in metric else "write 'exact_match,none'"
    with pytest.raises(TaskError, match=legal):
        built(config)


def test_what_no_number_is_made_of_is_refused(tmp_path: Path) -> None:
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["a", "b"], "doc_to_target": 0}
    for name, metric in (("b", "brier_score"), ("l", "likelihood")):
        tiny.write_task(tmp_path, name, QA, metric_list=tiny.metric_list(metric), **choice)
    tiny.write_task(tmp_path, "t", QA, **(EXACT | {"metric_list": tiny.metric_list("bleu")}))

    def asked(name: str, metric: str) -> TasksConfig:
        task = {"name": name, "metric": f"{metric},none"}
        return TasksConfig(tasks=[task], task_search_path=(str(tmp_path),))

    for name, metric in (("b", "brier_score"), ("t", "bleu")):
        assert built(asked(name, metric)).tasks[0].metric == metric
    with pytest.raises(TaskError, match=r"'likelihood' .* of which no number comes"):
        built(asked("l", "likelihood"))


def test_values_come_back_as_lm_evals_own_figures(tasks_dir: Path) -> None:
    from lm_eval.api import metrics

    taskset = built(tiny.tasks_config(tasks_dir, "tiny_text", "tiny_binary", "tiny_cloze"))
    text, binary, cloze = taskset.tasks
    lls = [-3.0 * (i + 1) for i in range(len(text.search))]
    docs = [taskset.asked["tiny_text"].requests[r.index][0].args[0] for r in text.items]
    items = [(ll, len(doc.split(" "))) for ll, doc in zip(lls, docs, strict=True)]
    found = taskset.aggregate(text, [ItemResult(ll) for ll in lls])
    assert found == metrics.weighted_perplexity(items)

    predicted = [i % 2 for i in range(len(binary.search))]
    gold = [taskset.asked["tiny_binary"].requests[r.index][0].doc["gold"] for r in binary.items]
    found = taskset.aggregate(binary, [ItemResult(float(p)) for p in predicted])
    assert found == metrics.f1_score(list(zip(gold, predicted, strict=True)))

    found = taskset.aggregate(cloze, [ItemResult(-2.0)] * len(cloze.search))
    assert found == pytest.approx(math.exp(2.0))
    with pytest.raises(CandidateFailed, match="is inf"):
        taskset.aggregate(cloze, [ItemResult(-1e9)] * len(cloze.search))
    with pytest.raises(ValueError, match="3 results for 60 items"):
        taskset.aggregate(cloze, [ItemResult(0.0)] * 3)


def test_what_items_say_is_told_for_people_to_read(tasks_dir: Path, tmp_path: Path) -> None:
    taskset = built(tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_text"))
    for task in taskset.tasks:
        asked = taskset.asked[task.name]
        texts = said(asked, task.items)
        assert texts.keys() == {ref.key for ref in task.items}
        for ref in task.items:
            doc, asks = asked.requests[ref.index][0].doc, asked.requests[ref.index][0].args[0]
            right = asked.task.doc_to_target(doc)
            if task.name == "tiny_choice":
                right = asked.task.doc_to_choice(doc)[right]
            assert texts[ref.key] == (asks, str(right).strip())
    qa(tmp_path, "long", [{"q": "x" * 2000 + f"{n}=", "gold": "y"} for n in range(40)])
    config = exact(tmp_path, tasks=[{"name": "long", "metric": "exact_match,none"}])
    taskset = built(config)
    first = taskset.refs()[0]
    assert said(taskset.asked["long"], [first])[first.key] == ("…" + "x" * 598 + "0=", "y")


def test_direction_and_negative_weights(tasks_dir: Path) -> None:
    """Lower is better counts against; a negative weight is taken as it stands, as upstream."""
    names = ["tiny_text", "tiny_cloze", "tiny_choice"]
    config = tiny.tasks_config(tasks_dir, *names)
    entries = [
        entry.model_copy(update={"weight": weight})
        for entry, weight in zip(config.tasks, (0.5, -0.1, 1.0), strict=True)
    ]
    taskset = built(config.model_copy(update={"tasks": tuple(entries)}))
    assert [t.higher_is_better for t in taskset.tasks] == [False, False, True]
    scores = {"tiny_text": 10.0, "tiny_cloze": 4.0, "tiny_choice": 0.5}
    assert taskset.objective(scores) == pytest.approx(-5.0 - 0.4 + 0.5)


# --- groups ----------------------------------------------------------------------------------

GROUP_RULE = [{"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}]


def group(directory: Path, **body: Any) -> TasksConfig:
    qa(directory, "leaf_a", QA[:40])
    qa(directory, "leaf_b", QA[40:50])
    write_yaml(directory / "g.yaml", {"group": "all", "task": ["leaf_a", "leaf_b"]} | body)
    return TasksConfig(
        tasks=[{"name": "all", "metric": "exact_match,none", "weight": 2.0}],
        task_search_path=(str(directory),),
        sealed_share=0.0,
    )


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_its_leaves_and_their_aggregate(tmp_path: Path, by_size: bool) -> None:
    rule = [GROUP_RULE[0] | {"weight_by_size": by_size}]
    taskset = built(group(tmp_path, aggregate_metric_list=rule))
    assert [task.name for task in taskset.tasks] == ["leaf_a", "leaf_b"]
    assert {task.objective for task in taskset.tasks} == {"all"}
    results = {ref: ItemResult(float(ref.task == "leaf_a")) for ref in taskset.refs()}
    score = taskset.score(results)
    share = 40 / 50 if by_size else 1 / 2
    assert score.tasks == (("all", pytest.approx(share)),)
    assert score.value == pytest.approx(2.0 * share)


def test_groups_without_an_aggregate_and_tags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no aggregate of its own.*leaf_a, leaf_b"):
        built(group(tmp_path / "one"))
    wrong = [GROUP_RULE[0] | {"metric": "acc", "filter_list": "none"}]
    with pytest.raises(TaskError, match="it has: acc,none"):
        built(group(tmp_path / "two", aggregate_metric_list=wrong))
    tiny.write_task(tmp_path / "three", "tagged", QA, **EXACT, tag="some_tag")
    with pytest.raises(TaskError, match=r"is a tag.*tagged"):
        built(TasksConfig(tasks=["some_tag"], task_search_path=(str(tmp_path / "three"),)))


def test_a_leaf_that_two_objectives_share_is_refused(tmp_path: Path) -> None:
    config = group(tmp_path, aggregate_metric_list=GROUP_RULE)
    more = (*config.tasks, config.tasks[0].model_copy(update={"name": "leaf_a"}))
    with pytest.raises(TaskError, match="both 'all' and 'leaf_a'"):
        built(config.model_copy(update={"tasks": more}))


# --- items -----------------------------------------------------------------------------------


def numbers(taskset: TaskSet, part: Any = "search") -> list[int]:
    return [ref.index for ref in taskset.refs(part)]


def exact(tmp_path: Path, **changes: Any) -> TasksConfig:
    if not (tmp_path / "mine.yaml").exists():
        qa(tmp_path, "mine")
    body: dict[str, Any] = {
        "tasks": [{"name": "mine", "metric": "exact_match,none"}],
        "task_search_path": (str(tmp_path),),
        "apply_chat_template": False,
    }
    return TasksConfig(**(body | changes))


def test_without_a_limit_the_split_is_by_what_is_asked(tmp_path: Path) -> None:
    taskset = built(exact(tmp_path, sealed_share=0.4))
    search, sealed = set(numbers(taskset)), set(numbers(taskset, "sealed"))
    assert search | sealed == set(range(len(QA)))
    assert not search & sealed
    assert 20 <= len(sealed) <= 45
    # the same documents in another order fall on the same sides
    qa(tmp_path / "turned", "mine", QA[::-1])
    config = exact(tmp_path / "turned", sealed_share=0.4)
    turned = built(config)
    assert {r.key for r in turned.refs("sealed")} == {r.key for r in taskset.refs("sealed")}
    assert numbers(turned) == sorted(numbers(turned))


def test_with_a_limit_sealed_items_come_from_beyond_it(tmp_path: Path) -> None:
    taskset = built(exact(tmp_path, limit=30, sealed_share=0.25))
    assert numbers(taskset) == list(range(30))
    sealed = numbers(taskset, "sealed")
    assert len(sealed) == 30
    assert min(sealed) >= 30
    assert sealed != list(range(30, 60))  # drawn from all that is left
    assert numbers(built(exact(tmp_path, limit=30, sealed_share=0.25)), "sealed") == sealed
    off = built(exact(tmp_path, limit=30, sealed_share=0.0))
    assert numbers(off, "sealed") == []
    assert off.notes == ()


def test_what_is_asked_in_the_search_is_never_sealed(tmp_path: Path) -> None:
    qa(tmp_path, "mine", QA[:25] + QA[:25] + QA[25:])
    taskset = built(exact(tmp_path, limit=25, sealed_share=0.7))
    keys = {ref.key for ref in taskset.refs()}
    assert taskset.refs("sealed")
    assert not keys & {ref.key for ref in taskset.refs("sealed")}


def test_too_few_items_turn_sealing_off_and_say_so(tmp_path: Path) -> None:
    for changes in ({"limit": len(QA) - MIN_SEALED + 1}, {"sealed_share": 0.02}):
        taskset = built(exact(tmp_path, **changes))
        assert numbers(taskset, "sealed") == []
        assert "no sealed items" in taskset.notes[0]
        assert len(taskset.refs()) == changes.get("limit", len(QA))


def test_a_small_task_among_sealed_ones_is_confirmed_on_its_search_items(tmp_path: Path) -> None:
    qa(tmp_path, "small", QA[:32])
    config = exact(tmp_path, limit=30)
    entries = (*config.tasks, config.tasks[0].model_copy(update={"name": "small"}))
    taskset = built(config.model_copy(update={"tasks": entries}))
    large, small = taskset.tasks
    assert not set(large.search) & set(large.sealed)
    assert small.search == small.sealed == tuple(range(30))
    assert any("'small' is confirmed on its search items" in note for note in taskset.notes)
    results = {ref: ItemResult(float(ref.task == "small")) for ref in taskset.refs("sealed")}
    assert taskset.score(results, "sealed").tasks == (("mine", 0.0), ("small", 1.0))


def test_shuffle_is_seeded(tmp_path: Path) -> None:
    first = numbers(built(exact(tmp_path, shuffle=True, limit=25)))
    assert first == numbers(built(exact(tmp_path, shuffle=True, limit=25)))
    assert first != sorted(first)
    assert first != numbers(built(exact(tmp_path, shuffle=True, limit=25, seed=1)))
    longer = numbers(built(exact(tmp_path, shuffle=True, limit=26)))
    assert longer[:25] == first


def test_changed_data_is_another_item(tmp_path: Path) -> None:
    """No cache of ours or of datasets' serves the old documents."""
    before = built(exact(tmp_path, sealed_share=0.0)).refs()
    changed = [*QA]
    changed[3] = changed[3] | {"gold": "j"}
    qa(tmp_path, "mine", changed)
    after = built(exact(tmp_path, sealed_share=0.0)).refs()
    assert [a.key == b.key for a, b in zip(before, after, strict=True)].count(False) == 1


# --- chat templates --------------------------------------------------------------------------


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="set apply_chat_template: false"):
        built(exact(tmp_path, apply_chat_template=True))
    entries = ({"name": "mine", "metric": "exact_match,none"},)
    default = TasksConfig(tasks=entries, task_search_path=(str(tmp_path),))
    unsaid = built(default)  # on by default, but a base model must run
    assert "no chat template" in unsaid.notes[0]
    assert unsaid.asked["mine"].requests[0][0].args[0] == "aa="
    told = built(default, tokenizer=tiny.tokenizer(tiny.TEMPLATE))
    assert told.asked["mine"].requests[0][0].args[0] == "<s>[u]aa=#[a]"


def test_perplexities_need_no_template(tasks_dir: Path) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_text", apply_chat_template=True)
    assert built(config).notes == ()


def test_document_choice_is_one_function(tmp_path: Path) -> None:
    config = exact(tmp_path, limit=200, sealed_share=0.25)
    chosen = choose_documents(1200, config, "t")
    assert len(chosen.search) == len(chosen.beyond) == 200
    wide = choose_documents(1200, config.model_copy(update={"sealed_share": 0.6}), "t")
    assert len(wide.beyond) == 300
