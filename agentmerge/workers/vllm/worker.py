"""Merges inside a live vLLM engine and scores there: no restart, nothing on disk.

The parents stay in the engine's own worker processes. ``load`` sends a recipe, which is merged and
written there, proves that the live weights are the merged ones, and empties the caches; ``score``
asks lm-eval's requests of the same engine. Knows nothing of searches.

Options (``worker.options``): ``max_length`` (context in tokens), ``base`` (the parent others are
compared with), ``way`` ("reload": always vLLM's own loader), ``in_place`` (false: vLLM's CPU build
may pack its weights), ``engine_process`` (whether the engine has a process of its own; by default
on a GPU only), ``engine_args`` (anything of vLLM's ``EngineArgs``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentmerge.contracts.worker import EngineInfo, Fingerprint, ItemRef, ItemResult, WorkerSpec
from agentmerge.errors import ParentError, RunFailed
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.playing import request
from agentmerge.evaluation.scoring import ItemScorer
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.merging.memory import device_name
from agentmerge.merging.placement import Demand
from agentmerge.parents.headers import refuse_replaced
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.recipe import Recipe
from agentmerge.workers.canary import Canary
from agentmerge.workers.conditions import conditions, conditions_hash
from agentmerge.workers.kinds import refuse_stack
from agentmerge.workers.vllm.deeper import extra_layers, stack_faults
from agentmerge.workers.vllm.preflight import demand, installed, preflight

#: Raised with any change of what is asked: results by different rules are never mixed.
SCORING = "vllm-2"

#: Room for the self-test, where all requests are shorter.
_LEAST_CONTEXT = 64


class VllmWorker:
    """See the module's head; the contract is ``contracts/worker.py``.

    Raises:
        ParentError: the parents cannot be merged.
        RunFailed: no swap into this model could be proved.
        WorkerLost: vLLM cannot run this model, or died.
    """

    has_canary = True
    runs_stacks = True
    fixed_depth = True

    def __init__(self, spec: WorkerSpec, taskset: TaskSet | None = None) -> None:
        from agentmerge.evaluation.tokenizers import context_length, tokenizer_of
        from agentmerge.workers.vllm.engine import Engine, vllm_imported

        with vllm_imported():
            from agentmerge.workers.vllm.lm import VllmLM

        self._spec = spec
        self._info = self.describe(spec)
        layout = read_layout(
            {name: Path(path) for name, path in spec.parents}, spec.options.get("base")
        )
        self._num_layers = layout.num_layers
        if faults := stack_faults(spec):
            raise ParentError("\n".join(faults))
        taskset = taskset or tasks_for(spec)
        tokenizer = tokenizer_of(spec)
        context = context_length(spec, tokenizer)
        lm = VllmLM(self._ask, tokenizer, context)
        self._scorer = ItemScorer(lm, taskset)
        requests = _requests(taskset)
        longest = max(lm.longest(requests), min(_LEAST_CONTEXT, context))
        if taskset.judged or taskset.served:  # how long a request gets is not known before
            longest = context
        probes = [lm.tok_encode(r.args[0] or "a") for r in requests[:: len(requests) // 4 + 1]]
        self._engine = Engine(spec, longest, probes)
        lm.embedding_rows = self._engine.token_rows
        try:
            refuse_replaced(spec.stamps)
        except RunFailed:
            self._engine.close()
            raise
        parent = Recipe.of_model(layout.parents[0], layout.num_layers).canonical(layout.num_layers)
        every = int(spec.options.get("canary_every", 0))
        self._canary = Canary(parent, taskset, spec.dtype, every, self._both)
        self._ready = False

    @staticmethod
    def tasks(spec: WorkerSpec) -> TaskSet:
        return tasks_for(spec)

    @staticmethod
    def preflight(spec: WorkerSpec, layout: Layout | None) -> tuple[list[str], list[str]]:
        return preflight(spec, layout)

    @staticmethod
    def demand(spec: WorkerSpec, layout: Layout) -> Demand:
        return demand(spec, layout)

    @staticmethod
    def describe(spec: WorkerSpec) -> EngineInfo:
        args = spec.options.get("engine_args") or {}
        release = (installed() or ("vllm", "not installed"))[1]
        versions = f"vllm {release}, torch {version('torch')}"
        if args:
            versions += f", {json.dumps(args, sort_keys=True)}"
        device = spec.device
        if device.startswith("cuda"):
            device = device_name(device)
        return EngineInfo(
            "vllm",
            versions,
            device,
            spec.dtype,
            str(spec.batch_size),
            int(args.get("tensor_parallel_size", 1)),
            SCORING if spec.options.get("in_place", True) else f"{SCORING}, packed",
            conditions_hash(spec, vllm=True),
        )

    @staticmethod
    def conditions(spec: WorkerSpec) -> dict[str, Any]:
        return conditions(spec, vllm=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        self._ready = False
        refuse_stack(recipe, self._num_layers, "vllm", self, extra_layers(self._spec))
        self._canary.before_candidate()
        fingerprint = self._load(recipe)
        self._ready = True
        return fingerprint

    def _load(self, recipe: Recipe) -> Fingerprint:
        self._scorer.recipe = recipe.hash()
        report = self._engine.load(recipe)
        return Fingerprint(report["recipe"], report["digest"], report["tensors"])

    def _both(
        self, recipe: Recipe, items: Sequence[ItemRef]
    ) -> tuple[Fingerprint, list[ItemResult]]:
        return self._load(recipe), self._scorer.score(items)

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        if not self._ready:
            raise RunFailed("nothing is loaded: load() a recipe before score()")
        return self._scorer.score(items)

    def close(self) -> None:
        self._ready = False
        try:
            self._canary.at_end()
        finally:
            self._engine.close()

    def _ask(self, prompts: Any, settings: Any) -> list[Any]:
        return self._engine.ask(prompts, settings)


def _requests(taskset: TaskSet) -> list[Any]:
    """All that will be asked; of conversations, the first turns."""
    first = [
        request(judged, judged.rendered(ref, ()))
        for name, judged in taskset.judged.items()
        for ref in taskset.task(name).items
    ]
    return first + [
        instance
        for asked in taskset.asked.values()
        for instances in asked.requests.values()
        for instance in instances
    ]
