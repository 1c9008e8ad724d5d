"""Which chat template asks, who says so, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge.cli.render import plan_text
from agentmerge.config import SearchConfig
from agentmerge.errors import ConfigError, UserError
from agentmerge.evaluation.building import build_tasks
from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.chat_templates import template_names, template_text
from agentmerge.preflight.anchoring import anchored
from agentmerge.preflight.plan import plan_of
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.session.export import export_run

OTHER = tiny.TEMPLATE.replace("[a]", "<a>")
DATED = "{{ strftime_now('%d %b %Y') }}" + tiny.TEMPLATE


def asked(config: Any, template: str) -> tuple[str, str]:
    """(the first prompt, the protocol's hash) of a task through a template."""
    taskset = build_tasks(config, tiny.tokenizer(template), template_source="b")
    return taskset.asked["tiny_answer"].requests[0][0].args[0], taskset.tasks[0].protocol_hash


def test_today_is_the_same_day_every_day(tasks_dir: Path) -> None:
    def config(**changes: Any) -> Any:
        changes = {"apply_chat_template": True, "limit": 2} | changes
        return tiny.tasks_config(tasks_dir, "tiny_answer", **changes)

    prompt, protocol = asked(config(), DATED)
    assert prompt.startswith("26 Jul 2024<s>")
    later, other_protocol = asked(config(chat_date="2026-11-29"), DATED)
    assert later.startswith("29 Nov 2026<s>")
    assert other_protocol != protocol
    plain = asked(config(), tiny.TEMPLATE)
    assert asked(config(chat_date="2026-11-29"), tiny.TEMPLATE) == plain
    taskset = build_tasks(config(), tiny.tokenizer(DATED), template_source="b")
    assert any("2024-07-26" in note for note in taskset.notes)
    assert taskset.protocols["tiny_answer"]["day"] == "2024-07-26"


@pytest.fixture
def place(tmp_path: Path, tasks_dir: Path) -> Path:
    """A base without a template, and two experts that were taught to talk in different ways."""
    base = tiny.write_model(tmp_path / "base", seed=3)
    tiny.write_model(tmp_path / "b", seed=4, near=base, template=tiny.TEMPLATE)
    tiny.write_model(tmp_path / "c", seed=5, near=base, template=OTHER)
    (tmp_path / "own.jinja").write_text(OTHER)
    return tmp_path


def body_of(place: Path, tasks_dir: Path, task: str = "tiny_answer", **genome: Any) -> Any:
    return {
        "genome": {
            "models": [str(place / "b"), str(place / "c")],
            "base_model": str(place / "base"),
            "merge_method": "task_arithmetic",
            **genome,
        },
        "tasks": [{"name": task, "metric": tiny.METRICS[task]}],
        "limit": 4,
        "task_search_path": [str(tasks_dir)],
        "search": {"seed": 1, "algorithm": "random", "population": 2, "sealed_share": 0},
        "budget": {"max_evaluations": 4},
        "worker": {"batch_size": 4, "device": "cpu"},
    }


def config_of(*args: Any, **genome: Any) -> SearchConfig:
    return SearchConfig.from_text(yaml.safe_dump(body_of(*args, **genome)))


def template_of(config: SearchConfig) -> str:
    prepared = prepare(config, weights=False)
    return str(next(iter(prepared.taskset.protocols.values()))["template"])


def test_where_experts_differ_the_template_is_demanded(place: Path, tasks_dir: Path) -> None:
    config = config_of(place, tasks_dir)
    with pytest.raises(ConfigError, match=r"chat_template is missing: '.*b', '.*c' have different"):
        prepare(config, weights=False)
    prepare(config_of(place, tasks_dir, "tiny_text"), weights=False)  # asks through none
    silent = body_of(place, tasks_dir) | {"apply_chat_template": False}
    prepare(SearchConfig.from_text(yaml.safe_dump(silent)), weights=False)
    (place / "c/chat_template.jinja").write_text(tiny.TEMPLATE + "\n")
    assert template_of(config) == tiny.TEMPLATE


def test_a_config_of_the_old_programs_runs_as_it_is(place: Path, tasks_dir: Path) -> None:
    """With the first expert's, which is said, and written down so that a resume finds it chosen."""
    body = body_of(place, tasks_dir)
    for section in ("search", "budget", "worker"):
        del body[section]
    limits = {"budget.max_evaluations": 3, "search.algorithm": "random", "worker.device": "cpu"}
    config = SearchConfig.from_text(yaml.safe_dump(body), overrides=limits)
    row = driving.run(config, name="old", runs_dir=place / "runs")
    said = [note for note in row.facts["notes"] if "have different chat templates" in note]
    assert len(said) == 1
    assert f"{str(place / 'b')!r} is the first" in said[0]
    more = driving.resume("old", runs_dir=place / "runs", overrides={"budget.max_evaluations": 4})
    assert more.status == "done"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("c", OTHER),
        ("own.jinja", OTHER),
        ("auto", tiny.TEMPLATE),
        ("first", tiny.TEMPLATE),
        (OTHER + "!", OTHER + "!"),
        ("chatml", template_text("chatml")),
    ],
    ids=["a model", "a file", "auto", "first", "a text", "a name"],
)
def test_how_it_is_chosen(
    place: Path,
    tasks_dir: Path,
    choice: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here with relative names, which mean the same from anywhere once anchored."""
    monkeypatch.chdir(place)
    body = body_of(Path(), tasks_dir, chat_template=choice)
    config = anchored(SearchConfig.from_text(yaml.safe_dump(body)))
    monkeypatch.chdir(place.parent)
    assert template_of(config) == expected
    again = SearchConfig.from_text(config.to_yaml())
    assert template_of(again) == expected
    plan = plan_of(prepare(again, weights=False), None, "")
    name = "that the config spells out" if "{" in choice else choice
    name = str(place / "b") if choice == "first" else name
    assert name in plan.chat_template
    assert f"config and tokenizer of {place / 'b'}" in plan_text(plan)


def test_an_unknown_name_is_refused_before_the_search(place: Path, tasks_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"'chatlm' is neither a model.*chatml.*nor a file"):
        prepare(config_of(place, tasks_dir, chat_template="chatlm"), weights=False)
    body = body_of(place, tasks_dir, chat_template="chatml")
    body["worker"]["lm_eval_args"] = {"chat_template": "alpaca"}
    with pytest.raises(ConfigError, match=r"'chatml' is not worker.lm_eval_args.chat_template"):
        SearchConfig.from_text(yaml.safe_dump(body))


def test_a_recipes_template_is_written_and_asked_through(place: Path, tasks_dir: Path) -> None:
    paths = {name: place / name for name in ("base", "b", "c")}
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nchat_template: NAME\n"
        "models: [{model: b, parameters: {weight: 0.5}}, {model: c, parameters: {weight: 0.5}}]\n"
    )
    for name in template_names():
        recipe = Recipe.parse(text.replace("NAME", name))
        export_checkpoint(recipe, paths, place / f"out-{name}", template_model="b", base="base")
        written = (place / f"out-{name}/chat_template.jinja").read_text()
        assert written == template_text(name)
    with pytest.raises(UserError, match=r"'chatlm' is no template that mergekit has; use one of"):
        export_checkpoint(
            Recipe.parse(text.replace("NAME", "chatlm")), paths, place / "no", template_model="b"
        )
    assert Recipe.parse(text).hash() == Recipe.parse(text.replace("NAME", "chatml")).hash()
    config = config_of(place, tasks_dir)
    here = {name: str(path) for name, path in paths.items()}
    named = text.replace("base_model: base", f"base_model: {here['base']}")
    for name in ("b", "c"):
        named = named.replace(f"model: {name},", f"model: {here[name]},")
    found = driving.evaluate(
        Recipe.parse(named.replace("NAME", "chatml")), config, runs_dir=place / "runs"
    )
    assert found["items"] == 4
    with pytest.raises(UserError, match=r"recipe's chat_template is 'chatml', and the config's"):
        driving.evaluate(
            Recipe.parse(named.replace("NAME", "chatml")),
            config_of(place, tasks_dir, chat_template="alpaca"),
            runs_dir=place / "runs",
        )


@pytest.mark.parametrize("engine", ["agentmerge", "mergekit"])
def test_the_export_talks_as_it_was_asked(place: Path, tasks_dir: Path, engine: str) -> None:
    config = config_of(place, tasks_dir, chat_template=str(place / "c"))
    row = driving.run(config, name="talk", runs_dir=place / "runs")
    assert any("chat template '" in note for note in (row.result or {})["notes"])
    report = export_run("talk", place / "out", runs_dir=place / "runs", engine=engine)
    assert (place / "out/chat_template.jinja").read_text() == OTHER
    if engine == "agentmerge":
        assert report["equal"] is True


def test_a_warm_start_with_another_template_is_refused(place: Path, tasks_dir: Path) -> None:
    recipe = place / "warm.yml"
    recipe.write_text(
        f"merge_method: linear\nchat_template: alpaca\nmodels: [{{model: {place / 'b'}, "
        f"parameters: {{weight: 1}}}}, {{model: {place / 'c'}, parameters: {{weight: 1}}}}]\n"
    )
    body = body_of(place, tasks_dir, chat_template="chatml")
    body["search"]["init"] = [str(recipe)]
    with pytest.raises(ConfigError, match=r"its chat_template 'alpaca' is not the search's"):
        prepare(SearchConfig.from_text(yaml.safe_dump(body)), fresh=True, weights=False)
