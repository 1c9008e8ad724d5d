"""Scores equal ``lm_eval.simple_evaluate`` on the same checkpoint, item for item."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM

from agentmerge.contracts.worker import ItemRef, ItemResult, WorkerSpec
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.hf_lm import LiveLM
from agentmerge.evaluation.scoring import ItemScorer
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.evaluation.tokenizers import context_length, tokenizer_of
from agentmerge.recipe import Recipe
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.hf import HfWorker
from benchmarks import architectures

NAMES = list(tiny.METRICS)


def scored(spec: WorkerSpec, dtype: str = "float32") -> tuple[TaskSet, dict[ItemRef, ItemResult]]:
    taskset = tasks_for(spec, check_built_ins=False)
    tokenizer = tokenizer_of(spec)
    model = AutoModelForCausalLM.from_pretrained(dict(spec.parents)["a"], dtype=dtype).eval()
    lm = LiveLM(model, tokenizer, spec.batch_size, context_length(spec, tokenizer))
    refs = taskset.refs()
    return taskset, dict(zip(refs, ItemScorer(lm, taskset).score(refs), strict=True))


def simple(spec: WorkerSpec, dtype: str = "float32", **arguments: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    manager = TaskManager(include_path=list(spec.tasks.task_search_path), include_defaults=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = simple_evaluate(
            "hf",
            model_args={"pretrained": dict(spec.parents)["a"], "dtype": dtype},
            tasks=[task.name for task in spec.tasks.tasks],
            batch_size=spec.batch_size,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
            num_fewshot=spec.tasks.num_fewshot,
            **arguments,
        )
    assert found is not None
    return dict(found)


def assert_equal(
    taskset: TaskSet,
    results: dict[ItemRef, ItemResult],
    theirs: dict[str, Any],
    tolerance: float = 1e-6,
) -> None:
    for task in taskset.tasks:
        samples = {
            sample["doc_id"]: sample
            for sample in theirs["samples"][task.name]
            if sample["filter"] == task.filter
        }
        assert len(samples) == len(task.search)
        for ref in task.part("search"):
            sample, ours = samples[ref.index], results[ref]
            value = sample[task.metric]
            if task.rebuild == "class":
                assert ours.value == value[1]
            elif task.metric in ("perplexity", "word_perplexity", "byte_perplexity"):
                value = value[0] if isinstance(value, tuple) else value
                assert math.isclose(ours.value, value, rel_tol=tolerance)
            else:
                assert ours.value == value
            if ours.log_likelihood is not None and task.output_type != "generate_until":
                gold = _gold_likelihood(task.output_type, sample)
                assert math.isclose(ours.log_likelihood, gold, rel_tol=tolerance)
        metric = theirs["results"][task.name][f"{task.metric},{task.filter}"]
        assert math.isclose(
            taskset.aggregate(task, [results[r] for r in task.part("search")]), metric,
            rel_tol=tolerance,
        )  # fmt: skip


def _gold_likelihood(output_type: str, sample: dict[str, Any]) -> float:
    responses = [response[0] for response in sample["resps"]]
    if output_type == "multiple_choice":
        return float(responses[sample["target"]][0])
    return float(responses[0][0] if isinstance(responses[0], tuple) else responses[0])


def test_every_output_type_in_float32(parent: Path, tasks_dir: Path) -> None:
    spec = tiny.spec({"a": parent}, tiny.tasks_config(tasks_dir, *NAMES))
    taskset, results = scored(spec)
    assert_equal(taskset, results, simple(spec))
    for task in taskset.tasks:  # the comparison is worth something: nothing is all right or wrong
        values = {results[ref].value for ref in task.part("search")}
        assert len(values) > 1, task.name


def test_bfloat16_in_identical_batches(tmp_path: Path, tasks_dir: Path, parent: Path) -> None:
    model = tiny.write_model(tmp_path / "bf16", seed=5, near=parent, dtype="bfloat16")
    names = ["tiny_choice=acc,none", "tiny_cloze=acc,none", "tiny_text", "tiny_answer"]
    spec = tiny.spec({"a": model}, tiny.tasks_config(tasks_dir, *names))
    taskset, results = scored(spec, "bfloat16")
    assert_equal(taskset, results, simple(spec, "bfloat16"), tolerance=0.0)


@pytest.mark.parametrize("multiturn", [True, False])
def test_with_a_chat_template_and_few_shots(
    tmp_path: Path, tasks_dir: Path, multiturn: bool
) -> None:
    model = tiny.write_model(
        tmp_path / "chat", seed=3, template=tiny.TEMPLATE, max_position_embeddings=256
    )
    config = tiny.tasks_config(
        tasks_dir,
        "tiny_choice",
        "tiny_answer",
        "tiny_filtered",
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        num_fewshot=1,
        limit=24,
    )
    spec = tiny.spec({"a": model}, config)
    taskset, results = scored(spec)
    theirs = simple(spec, limit=24, apply_chat_template=True, fewshot_as_multiturn=multiturn)
    sample = theirs["samples"]["tiny_answer"][0]
    assert taskset.asked["tiny_answer"].requests[0][0].args[0] == sample["arguments"][0][0]
    assert_equal(taskset, results, theirs)


def test_a_document_asks_the_same_whatever_the_limit(parent: Path, tasks_dir: Path) -> None:
    """Few-shot examples are those of lm-eval's full run, so results are shared between limits."""
    spec = tiny.spec({"a": parent}, tiny.tasks_config(tasks_dir, "tiny_filtered"))
    keys = {ref.index: ref.key for ref in tasks_for(spec, check_built_ins=False).refs()}
    for changes in ({"limit": 7}, {"limit": 9, "shuffle": True, "sealed_share": 0.5}):
        config = spec.tasks.model_copy(update=changes)
        some = tasks_for(tiny.spec({"a": parent}, config), check_built_ins=False)
        assert some.tasks[0].items
        assert all(keys[ref.index] == ref.key for ref in some.tasks[0].items)


@pytest.mark.parametrize("model_type", ["phi", "gptj", "mixtral", "bert"])
def test_a_parent_alone_is_that_parent(model_type: str, tmp_path: Path, tasks_dir: Path) -> None:
    """What the worker scores of a parent among others, once a merge was live, is what lm-eval
    scores of its folder: biases of heads, fused experts and embeddings outside the stack too."""
    paths = architectures.write_family(model_type, tmp_path)
    for path in paths.values():
        tiny.tokenizer().save_pretrained(path)
    spec = tiny.spec(paths, tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_cloze"))
    worker = HfWorker(spec)
    halves = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]"
    worker.load(Recipe.parse(halves).canonical(2))
    worker.load(Recipe.of_model("a", 2).canonical(2))
    taskset = worker.tasks(spec)
    refs = taskset.refs()
    results = dict(zip(refs, worker.score(refs), strict=True))
    worker.close()
    assert_equal(taskset, results, simple(spec))


@pytest.mark.slow
def test_the_disk_worker_scores_fused_experts_as_the_hf_worker_does(
    tmp_path: Path, tasks_dir: Path
) -> None:
    paths = architectures.write_family("mixtral", tmp_path)
    for path in paths.values():
        tiny.tokenizer().save_pretrained(path)
    spec = tiny.spec(paths, tiny.tasks_config(tasks_dir, "tiny_choice", limit=12))
    recipe = Recipe.parse(
        "merge_method: ties\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: 0.5, density: 0.5}}, {model: b}]\n"
        "parameters: {weight: 1, density: 0.6}"
    ).canonical(2)
    found = []
    for kind in (HfWorker, DiskWorker):
        worker = kind(spec)
        worker.load(recipe)
        found.append(worker.score(worker.tasks(spec).refs()))
        worker.close()
    assert found[0] == found[1]
