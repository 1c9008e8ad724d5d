"""Users' configs load unmodified; every fault is found at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.config import SearchConfig, models_asked
from agentmerge.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"
GENOME = "genome:\n  models: [a, b]\n  merge_method: linear\n"
BASE = GENOME + "tasks: [x]\n"


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        SearchConfig.from_text(text, "c.yml")
    return caught.value.faults


def test_the_reference_config_loads_unmodified() -> None:
    config = SearchConfig.from_file(DATA / "evolve-config.yml")
    assert config.warnings == ()
    assert config.genome.filters == ("self_attn", "mlp")
    assert [task.weight for task in config.tasks.tasks] == [1.0, -0.1, 1.0]
    assert config.tasks.tasks[2].metric == "acc,none"
    assert config.algorithm == "auto"
    assert SearchConfig.from_text(config.to_yaml()) == config


def test_an_unset_chat_template_stays_unset() -> None:
    again = SearchConfig.from_text(SearchConfig.from_text(BASE).to_yaml())
    assert "apply_chat_template" not in again.tasks.model_fields_set


def test_unknown_keys_in_our_sections_name_the_nearest_and_the_line() -> None:
    assert faults(BASE + "search:\n  sead: 3\n") == [
        "c.yml:6: search.sead is not a known key; did you mean 'seed'?"
    ]


def test_unknown_keys_in_theirs_are_a_note_and_misspelt_ones_a_warning() -> None:
    text = GENOME + "  fitlers: []\ntasks: [{name: x, metirc: acc}]\nnum_gpus: 2\nLimit: 3\n"
    config = SearchConfig.from_text(text)
    assert [line.split("did you mean ")[1] for line in config.warnings] == [
        "'limit'? (as it stands it does nothing)",
        "'filters'? (as it stands it does nothing)",
        "'metric'? (as it stands it does nothing)",
    ]
    (notice,) = config.notices
    assert notice.startswith("config:6: num_gpus is not a known key")


def test_a_key_that_is_written_twice_is_told() -> None:
    text = GENOME + "tasks: [x]\nlimit: 3\nlimit: 5\n"
    config = SearchConfig.from_text(text, "c.yml")
    assert config.tasks.limit == 5, "as YAML and the old programs read it"
    assert config.warnings == (
        "c.yml: limit is written on lines 5 and 6: the last one counts; remove one",
    )
    inside = BASE + "budget: {max_evaluations: 3, max_evaluations: 9}\n"
    assert faults(inside) == [
        "c.yml: budget.max_evaluations is written twice on line 5: the last one counts; remove one"
    ]


def test_what_slerp_does_with_more_than_two_models_is_told() -> None:
    head = "genome:\n  merge_method: slerp\n"
    two = head + "  models: [a, b]\n  base_model: a\ntasks: [x]\n"
    assert SearchConfig.from_text(two).notices == ()
    ancestor, three = SearchConfig.from_text(
        head + "  models: [a, b, c]\n  base_model: old\ntasks: [x]\n"
    ).notices
    assert "'old' is not among the models, so it is no part of a slerp merge" in ancestor
    assert "which two a layer group is made of" in three


def test_all_faults_at_once() -> None:
    found = faults(
        "genome:\n  models: [a]\n  merge_method: tis\n"
        "tasks: [x, x]\nbudget: {max_evaluations: none}\nworker: {kinds: hf}\n"
        "search: {sigma_low: 0.5, sigma_high: 0.1}\n"
    )
    text = "\n".join(found)
    for part in ("'tis' is not known", "at least two", "x twice", "max_evaluations", "'kind'"):
        assert part in text
    assert "sigma_low 0.5 is above sigma_high 0.1" in text


@pytest.mark.parametrize(
    "text",
    ["", "a", "- 1", "genome: 3\ntasks: [x]", GENOME, "genome: {}\ntasks: [x]", "genome: [\n"],
)
def test_nonsense_is_a_sentence(text: str) -> None:
    assert all(fault.startswith("c.yml") for fault in faults(text))


def test_task_vector_methods_need_a_base() -> None:
    text = BASE.replace("linear", "ties")
    assert "ties needs one" in faults(text)[0]


def test_auto_is_the_default_with_and_without_a_model() -> None:
    assert SearchConfig.from_text(BASE).algorithm == "auto"
    advised = SearchConfig.from_text(BASE + "agents: {critic: 'openai:x'}\nworker: {count: 2}\n")
    assert advised.algorithm == "auto"
    assert [advised.generation_size(own) for own in (1, 9)] == [2, 9]


@pytest.mark.parametrize(
    ("size", "asked"),
    [(1, [0, 4, 8]), (2, [0, 2, 4, 6, 8]), (3, [0, 2, 4, 6, 8]), (9, [*range(9)])],
)
def test_models_are_asked_once_in_four_candidates(size: int, asked: list[int]) -> None:
    assert [g for g in range(9) if models_asked(g, size)] == asked
