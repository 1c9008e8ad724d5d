"""What every worker promises (``contracts/worker.py``), as tests that a worker's author inherits.

    class TestMine(ModelWorkerSuite):
        kind = "mine"

The models are the demo's, trained in a minute and kept in the cache, and so are the tasks; override
``spec`` for others. It knows the contract, and no worker.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import (
    Differentiator,
    Fingerprint,
    ItemRef,
    ItemResult,
    Worker,
    WorkerSpec,
)
from agentmerge.demo.family import cached_family
from agentmerge.demo.tasks import demo_config, write_tasks
from agentmerge.errors import CandidateFailed, ParentError, RunFailed
from agentmerge.merging.stack import outputs_of
from agentmerge.parents.headers import read_config
from agentmerge.plugins import load
from agentmerge.recipe import Recipe


def demo_spec(folder: Path, kind: str, *, limit: int = 12, **changes: Any) -> WorkerSpec:
    """A worker's spec over the demo's base and two experts, all of ``limit`` items a task; the
    tasks are written into ``folder``. changes: of the spec."""
    family = cached_family(("shift", "sort"), 0)
    entries = demo_config(family, write_tasks(folder, family.skills, n_items=2 * limit))["tasks"]
    tasks = TasksConfig(
        tasks=entries, task_search_path=(str(folder),), limit=limit, sealed_share=0.0,
        apply_chat_template=False,
    )  # fmt: skip
    body: dict[str, Any] = {
        "kind": kind,
        "parents": tuple((path.name, str(path)) for path in (family.base, *family.experts)),
        "template_model": family.base.name,
        "tasks": tasks,
        "dtype": "float32",
        "batch_size": 16,
    }
    return WorkerSpec(**(body | changes))


def weighted(
    spec: WorkerSpec, b: Any, c: Any, method: str = "task_arithmetic", **more: Any
) -> Recipe:
    """The canonical merge of a spec's second and third parent, so weighted, onto the first."""
    names = [name for name, _ in spec.parents]
    models = [
        {"model": name, "parameters": {"weight": weight, **more}}
        for name, weight in zip(names[1:3], (b, c), strict=True)
    ]
    body = {"merge_method": method, "base_model": names[0], "models": models}
    return Recipe.parse(body).canonical(_layers(spec))


def _layers(spec: WorkerSpec) -> int:
    config = Path(spec.parents[0][1], "config.json").read_text()
    return int(json.loads(config)["num_hidden_layers"])


def of(model: str, start: int, end: int, weight: Any) -> dict[str, Any]:
    """A source of a linear slice."""
    return {"model": model, "layer_range": [start, end], "parameters": {"weight": weight}}


def same(ours: list[ItemResult], theirs: list[ItemResult]) -> bool:
    """Bit for bit, where NaN is NaN."""
    return repr(ours) == repr(theirs)


class WorkerSuite:
    """kind: the worker's name among the plugins."""

    kind: str

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        """Three parents or more, the first of them the base of the others."""
        return demo_spec(tmp_path_factory.mktemp("tasks"), cls.kind)

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, spec: WorkerSpec) -> Any:
        """The worker's class."""
        return load("agentmerge.workers", spec.kind)

    @pytest.fixture(scope="class")
    @classmethod
    def refs(cls, made: Any, spec: WorkerSpec) -> tuple[ItemRef, ...]:
        found: tuple[ItemRef, ...] = made.tasks(spec).refs()
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def worker(cls, made: Any, spec: WorkerSpec) -> Iterator[Worker]:
        built: Worker = made(spec)
        yield built
        built.close()

    @pytest.fixture(scope="class")
    @classmethod
    def first(
        cls, worker: Worker, spec: WorkerSpec, refs: tuple[ItemRef, ...]
    ) -> tuple[Fingerprint, list[ItemResult]]:
        """What one merge is and shows, before anything else was loaded."""
        return worker.load(weighted(spec, 0.9, 0.2)), worker.score(refs)

    def test_results_do_not_depend_on_what_was_loaded_before(
        self,
        worker: Worker,
        spec: WorkerSpec,
        refs: tuple[ItemRef, ...],
        first: tuple[Fingerprint, list[ItemResult]],
    ) -> None:
        fingerprint, results = first
        assert len(results) == len(refs)
        assert len({result.value for result in results}) > 1
        other = worker.load(weighted(spec, 0.1, 1.4))
        assert other.digest != fingerprint.digest
        assert other.recipe != fingerprint.recipe
        assert not same(worker.score(refs), results)
        assert worker.load(weighted(spec, 0.9, 0.2)) == fingerprint
        turned = worker.score(refs[::-1])  # the same items in another order: the same answers
        assert same(turned[::-1], results)

    def test_a_bad_recipe_is_the_candidates_fault(
        self,
        worker: Worker,
        spec: WorkerSpec,
        refs: tuple[ItemRef, ...],
        first: tuple[Fingerprint, list[ItemResult]],
    ) -> None:
        with pytest.raises(CandidateFailed):
            worker.load(weighted(spec, 1e308, 1e308))
        with pytest.raises(RunFailed, match="load"):  # never the answers of what is half there
            worker.score(refs)
        assert worker.load(weighted(spec, 0.9, 0.2)) == first[0]

    def test_a_gradient_is_that_of_the_recipe_and_leaves_it_live(
        self,
        worker: Worker,
        spec: WorkerSpec,
        refs: tuple[ItemRef, ...],
        first: tuple[Fingerprint, list[ItemResult]],
    ) -> None:
        if not isinstance(worker, Differentiator):
            return  # nobody promised one
        recipe = weighted(spec, 0.9, 0.2)
        gradient = worker.gradient(recipe, refs)
        assert same(worker.score(refs), first[1])
        assert worker.gradient(weighted(spec, 0.1, 1.4), refs) != gradient
        assert worker.gradient(recipe, refs) == gradient
        assert gradient.items <= len(refs)
        # The log-likelihood: margins have kinks, where another token or choice becomes the nearest.
        smooth = worker.gradient(recipe, refs, "log_likelihood")
        up, down = (
            worker.gradient(weighted(spec, 0.9 + step, 0.2), refs, "log_likelihood").loss
            for step in (1e-2, -1e-2)
        )
        one, other = (name for name, _ in spec.parents[1:3])
        slope = sum(dict(tensor.weights)[one] for tensor in smooth.tensors)
        assert slope == pytest.approx((up - down) / 2e-2, rel=0.05)
        single = {
            "merge_method": "slerp",
            "base_model": one,
            "models": [{"model": one}, {"model": other}],
        }
        with pytest.raises(CandidateFailed, match="gradient"):
            worker.gradient(Recipe.parse(single).canonical(_layers(spec)), refs)
        worker.load(recipe)

    def test_info_is_known_before_a_worker_is_built(
        self, made: Any, worker: Worker, spec: WorkerSpec
    ) -> None:
        assert isinstance(worker, Worker)
        assert worker.info == made.describe(spec)
        assert worker.info.engine == spec.kind
        assert worker.info.batch_size == str(spec.batch_size)

    def test_scoring_before_loading_is_refused(
        self, made: Any, spec: WorkerSpec, refs: tuple[ItemRef, ...]
    ) -> None:
        fresh = made(spec)
        with pytest.raises(RunFailed, match="load"):
            fresh.score(refs)
        fresh.close()


class ModelWorkerSuite(WorkerSuite):
    """Of a worker that reads its parents' weights and computes their answers.

    no_number: what its CandidateFailed says of a log-likelihood or a loss that is none.
    """

    no_number = r"nan|NaN|inf|finite"

    def test_a_parent_with_nan_is_named(self, made: Any, spec: WorkerSpec, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        base, one, (name, whole), *rest = spec.parents
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        path = next(broken.glob("*.safetensors"))
        weights = load_file(path)
        tensor = next(key for key in weights if key.endswith("norm.weight"))
        weights[tensor][3] = math.nan
        save_file(weights, path, metadata={"format": "pt"})
        there = replace(spec, parents=(base, one, (name, str(broken)), *rest))
        with pytest.raises((ParentError, CandidateFailed), match="finite"):
            made(there).load(weighted(spec, 0.9, 0.2))

    def test_a_layer_that_adds_nothing_is_as_none(
        self,
        made: Any,
        worker: Worker,
        spec: WorkerSpec,
        refs: tuple[ItemRef, ...],
        first: tuple[Fingerprint, list[ItemResult]],
    ) -> None:
        """Of a worker that runs stacks; and none is there when the next merge is."""
        if not getattr(made, "runs_stacks", False):
            return
        names, depth = [name for name, _ in spec.parents[:3]], _layers(spec)
        outputs = outputs_of(read_config(Path(spec.parents[0][1])))
        nothing = [{"filter": e, "value": 0} for e in (*outputs.attention, *outputs.mlp)]
        own = dict(zip(names, (-0.2, 0.5, 0.7), strict=True))
        slices = [
            {"sources": [of(name, 0, depth - 1, weight) for name, weight in own.items()]},
            {"sources": [of(names[1], 0, 1, [*nothing, {"value": 1}])]},
            {"sources": [of(name, depth - 1, depth, weight) for name, weight in own.items()]},
        ]
        loaded, found = [], []
        for some in (slices[::2], slices):
            body = {"merge_method": "linear", "parameters": {"normalize": False}, "slices": some}
            loaded.append(worker.load(Recipe.parse(body).canonical(depth)))
            found.append(worker.score(refs))
        assert loaded[0].digest != loaded[1].digest
        assert loaded[0].tensors < loaded[1].tensors
        assert same(*found)
        assert worker.load(weighted(spec, 0.9, 0.2)) == first[0]

    def test_an_answer_that_is_no_number_fails_the_candidate(
        self, made: Any, spec: WorkerSpec, refs: tuple[ItemRef, ...]
    ) -> None:
        """Weights are finite, and what they compute is not. Argmax over NaN would pick a token."""
        worker = made(spec)
        huge = [{"filter": "mlp", "value": 1e24}, {"value": 0.5}]
        worker.load(weighted(spec, huge, huge))
        for task in dict.fromkeys(ref.task for ref in refs):
            with pytest.raises(CandidateFailed, match=self.no_number):
                worker.score([ref for ref in refs if ref.task == task])
        worker.close()
