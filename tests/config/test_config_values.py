"""What a config's values may be: each wrong one is a fault with its place, none a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmerge.config import LayersConfig, SearchConfig
from agentmerge.errors import ConfigError
from agentmerge.space.grouped import SearchSpace

DATA = Path(__file__).parents[1] / "data"
GENOME = "genome:\n  models: [a, b]\n  merge_method: linear\n"
BASE = GENOME + "tasks:\n  - x\n"


def faults(text: str, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        SearchConfig.from_text(text, "c.yml", overrides)
    return caught.value.faults


WRONG = {
    "limit": ("limit: -1", "c.yml:6: limit must be above 0, not -1"),
    "few-shot": ("num_fewshot: many", "num_fewshot must be a whole number, not 'many'"),
    "temperature": ("agents: {temperature: -1}", "agents.temperature must be at least 0, not -1"),
    "shadow": ("search: {shadow: 1}", "search.shadow must be below 1, not 1"),
    "a nested key": ("search: {racing: {alfa: 1}}", "search.racing.alfa is not a known key"),
    "a missing key": (
        "search: {constraints: [{task: x}]}",
        "constraints.0: a constraint has task and max_drop, or tokens",
    ),
    "a choice": ("worker: {placement: gpu}", "must be 'auto', 'device', 'host' or 'stream'"),
    "a switch": ("worker: {allow_pickle: maybe}", "worker.allow_pickle must be true or false"),
    "no address": ("agents: {base_url: not a url}", "'not a url' is no address of a server"),
    "no scheme": ("agents: {critic: {base_url: 'h:80/v1'}}", "write http://HOST:PORT/v1"),
    "no model": ("agents: {llm: ''}", "agents.llm: it is empty; write none, or provider:model"),
    "a role's, empty": ("agents: {critic: ' '}", "agents.critic.model: it is empty"),
    "twice, ours": ("search: {seed: 1}\nsearch: {seed: 2}", "search is written on lines 6 and 7"),
    "seed": ("search: {seed: -3}", "c.yml:6: search.seed"),
    "population": ("search:\n  population: 0", "c.yml:7: search.population"),
    "sigma": ("search:\n  sigma_low: 0", "c.yml:7: search.sigma_low"),
    "retries": ("agents: {max_retries: -1}", "c.yml:6: agents.max_retries"),
    "workers": ("worker: {count: 0}", "c.yml:6: worker.count"),
    "workers, a switch": ("worker: {count: true}", "worker.count must be a whole number, not True"),
    "a window, a switch": ("search: {lag: true}", "search.lag must be a whole number, not True"),
    "a share, a switch": ("search: {shadow: false}", "search.shadow must be a number, not False"),
    "workers, a word": ("worker: {count: foo}", "a whole number, or 'auto', not 'foo'"),
    "batch": ("worker: {batch_size: auto}", "c.yml:6: worker.batch_size"),
    "timeout": ("budget: {timeout_s: 0}", "c.yml:6: budget.timeout_s"),
    "a timeout no clock has": ("worker: {timeout_s: 1e300}", "worker.timeout_s must be at most"),
    "a budget no clock has": ("budget: {timeout_s: 1e12}", "budget.timeout_s must be at most"),
    "a reply no clock has": ("agents: {timeout_s: 1e300}", "agents.timeout_s must be at most"),
    "a role's, no clock's": ("agents: {critic: {model: 'a:b', timeout_s: 1e12}}", "at most 1e+08"),
    "too many retries": ("agents: {max_retries: 1000000000}", "agents.max_retries must be at most"),
    "too many workers": ("worker: {count: 100000}", "worker.count must be at most 1024"),
    "timeout, no number": ("budget: {timeout_s: .nan}", "c.yml:6: budget.timeout_s"),
    "a section as a list": ("search: [1]", "c.yml:6: search must be a mapping"),
    "sealed share": ("search: {sealed_share: 1.0}", "c.yml:6: search.sealed_share"),
    "init as text": (
        "search: {init: one.yml}",
        "c.yml:6: search.init must be a list, as in [a, b]",
    ),
    "options as a list": ("worker: {options: [1]}", "c.yml:6: worker.options"),
    "a near miss, ours": ("budget: {max_evals: 3}", "did you mean 'max_evaluations'?"),
    "a far miss, ours": ("worker: {zzz: 3}", "known keys: allow_pickle, batch_size"),
    "infinite sigma": ("search: {sigma_low: .inf, sigma_high: .inf}", "search.sigma"),
    "search path": ("task_search_path: 3", "task_search_path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_fault_is_in_the_words_of_a_library(name: str) -> None:
    text, _ = WRONG[name]
    assert not [fault for fault in faults(BASE + text + "\n") if "Input should" in fault]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_a_fault_with_its_place(name: str) -> None:
    text, words = WRONG[name]
    found = faults(BASE + text + "\n")
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_a_tasks_weight_is_a_finite_number(number: str) -> None:
    found = faults(GENOME + f"tasks:\n  - {{name: x, weight: {number}}}\n")
    assert any("tasks.0.weight" in fault for fault in found), found


@pytest.mark.parametrize(
    ("genome", "words"),
    [
        ({"models": ["a"]}, "at least two"),
        ({"models": ["a", "a"]}, "names 'a' twice"),
        ({"models": "a"}, "genome.models"),
        ({"merge_method": "nope"}, "is not known; use one of "),
        ({"merge_method": "dare_ties"}, "base_model is missing"),
        ({"merge_method": "slerp", "smooth": True}, "smooth is not possible with slerp"),
        ({"merge_method": "slerp", "filters": ["mlp"]}, "filters is not possible with slerp"),
        ({"filters": ["mlp", "mlp"]}, "names one twice"),
        ({"layer_granularity": -1}, "layer_granularity"),
        ({"layers": -1}, "genome.layers.most must be at least 0, not -1"),
        ({"layers": "4 more"}, "genome.layers must be a mapping"),
        ({"layers": {"mots": 3}}, "genome.layers.mots is not a known key; did you mean 'most'?"),
        ({"layers": 0}, "genome.layers: most 0 leaves nothing to search; set skip: true or a "),
        ({"layers": {"scales": [0.1, 1.5]}}, "scales [0.1, 1.5] must go from 0 or below to 1 or"),
        ({"layers": {"scales": [-1, float("nan")]}}, "genome.layers.scales.1 must be a finite"),
        ({"layers": {"scales": [-1, 0.5]}}, "to 1 or above: at 0 a layer is absent"),
        ({"layers": {"scales": [-1, 1e308]}}, "scales [-1.0, 1e+308] must lie between -10 and 10"),
        ({"layers": {"scales": [-11, 1]}}, "scales [-11.0, 1.0] must lie between -10 and 10"),
        ({"layers": {"repeats": 2}}, "genome.layers: repeats is read with path: true"),
        ({"layers": {"insert": ["c"]}}, "layers.insert names 'c'; use one of merge, experts, base"),
        ({"layers": {"insert": "base"}}, "names the base, and there is no base_model"),
        ({"layers": {"insert": ["a", "a"]}}, "insert names 'a' twice"),
        ({"layers": {"insert": []}}, "genome.layers.insert needs 1 entries or more"),
    ],
)
def test_a_wrong_genome(genome: dict[str, Any], words: str) -> None:
    overrides = {f"genome.{key}": value for key, value in genome.items()}
    assert words in "\n".join(faults(BASE, overrides))


def test_every_section_speaks_in_one_answer() -> None:
    text = (
        "genome:\n  models: [a]\n  merge_method: linear\n"
        "tasks:\n  - {name: x, weight: heavy}\nlimit: 0\n"
        "search: {sead: 1}\nagents: {timeout_s: -1}\nworker: {count: 0}\n"
        "budget: {max_evaluations: 0}\n"
    )
    found = "\n".join(faults(text))
    for place in ("genome", "tasks.0.weight", "limit", "search.sead", "agents.timeout_s",
                  "worker.count", "budget.max_evaluations"):  # fmt: skip
        assert place in found


def test_the_command_line_wins_over_the_file() -> None:
    config = SearchConfig.from_text(
        BASE + "search: {seed: 3}\nlimit: 9\n",
        "c",
        {"search.seed": 5, "limit": 2, "worker.kind": "x"},
    )
    assert (config.search.seed, config.tasks.limit, config.worker.kind) == (5, 2, "x")
    assert "did you mean 'seed'" in faults(BASE, {"search.seeds": 1})[0]


def test_bare_names_and_full_entries_mix() -> None:
    text = GENOME + "tasks:\n  - x\n  - {name: y, weight: -0.1, metric: 'word_perplexity,none'}\n"
    found = SearchConfig.from_text(text).tasks.tasks
    assert [(t.name, t.weight, t.metric) for t in found] == [
        ("x", 1.0, "acc,none"),
        ("y", -0.1, "word_perplexity,none"),
    ]
    assert SearchConfig.from_text(GENOME + "tasks: x\n").tasks.tasks[0].name == "x"


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "random_init: true\n",
        "apply_chat_template: false\nfewshot_as_multiturn: false\n",
        "apply_chat_template: true\n",
        "limit: 7\nnum_fewshot: 0\nshuffle: true\n",
        "task_search_path: [/tasks, /more]\n",
        "search: {algorithm: random, seed: 4, init: [/a.yml], sealed_share: 0.0}\n",
        "search: {companion: false, graph: other, sigma0: 0.3}\n",
        "agents: {llm: 'openai:x', critic: none, temperature: 0.5, base_url: 'http://x/v1'}\n",
        "worker: {kind: fake, count: 2, options: {delay_s: 0.1, fail_when: [a, b]}}\n",
        "budget: {max_evaluations: 3, timeout_s: 9.5}\n",
        "search:\nworker:\nagents:\nbudget:\n",
    ],
)
def test_written_and_read_again_it_is_equal(extra: str) -> None:
    config = SearchConfig.from_text(BASE + extra)
    again = SearchConfig.from_text(config.to_yaml())
    assert again == config
    assert again.warnings == ()
    assert again.to_yaml() == config.to_yaml()
    unset = "apply_chat_template" in config.tasks.model_fields_set
    assert ("apply_chat_template" in again.tasks.model_fields_set) == unset


def test_the_reference_config_reads_as_documented() -> None:
    config = SearchConfig.from_file(DATA / "evolve-config.yml")
    genome, tasks = config.genome, config.tasks
    assert genome.models == (
        "NCSOFT/Llama-VARCO-8B-Instruct",
        "akjindal53244/Llama-3.1-Storm-8B",
    )
    assert (genome.merge_method, genome.base_model) == ("dare_ties", "meta-llama/Llama-3.1-8B")
    assert (genome.layer_granularity, genome.normalizes) == (8, False)
    assert (genome.smooth, genome.allow_negative_weights) == (False, False)
    assert (tasks.limit, tasks.num_fewshot, tasks.shuffle) == (200, 0, False)
    assert (tasks.apply_chat_template, tasks.fewshot_as_multiturn) == (True, True)
    assert config.search.random_init is False


@pytest.mark.parametrize(
    ("method", "on"),
    [("linear", True), ("ties", True), ("dare_ties", True), ("task_arithmetic", False)],
)
def test_normalize_is_upstreams_default_unless_set(method: str, on: bool) -> None:
    method_of = {"genome.merge_method": method, "genome.base_model": "base"}
    assert SearchConfig.from_text(BASE, "c", method_of).genome.normalizes is on
    set_off = method_of | {"genome.normalize": not on}
    assert SearchConfig.from_text(BASE, "c", set_off).genome.normalizes is not on


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config at"):
        SearchConfig.from_file(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot be read"):
        SearchConfig.from_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        SearchConfig.from_file(tmp_path / "binary")


def test_layers_are_searched_where_they_are_asked_for() -> None:
    def layers(text: str) -> LayersConfig | None:
        config = SearchConfig.from_text(GENOME + f"  layers: {text}\ntasks: [x]\n")
        assert SearchConfig.from_text(config.to_yaml()) == config
        return config.genome.layers

    assert layers("4") == layers("{most: 4}") == layers("true") == LayersConfig()
    assert layers("false") is layers("null") is None
    assert layers("{insert: a, skip: true, most: 0}") == LayersConfig(
        insert=("a",), skip=True, most=0
    )
    assert layers("{path: true, repeats: 3}") == LayersConfig(path=True, repeats=3)


def test_layers_of_one_expert_of_a_pool_are_refused() -> None:
    """Which experts a merge has is found out later; the base it always has."""
    pool = {"genome.models": ["a", "b", "c", "d"], "genome.base_model": "d", "genome.pool": 2}
    found = faults(BASE, pool | {"genome.layers": {"insert": ["a"]}})
    assert found == [
        "c.yml:1: genome: layers.insert names 'a', which a merge of genome.pool may not have; use "
        "merge or experts"
    ]
    for insert in (["experts"], ["merge", "base"], ["d"]):
        SearchConfig.from_text(BASE, "c.yml", pool | {"genome.layers": {"insert": insert}})


def test_a_config_without_layers_is_stored_as_before_there_were_any() -> None:
    genome = SearchConfig.from_text(BASE).genome
    assert "layers" not in genome.model_dump(mode="json")
    assert SearchSpace(genome, 4).key == "9da319065286"
