"""Kinds of workers: the class that a spec names, what it can run, and how one is built where it
is to live.

Starts no worker and knows no device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentmerge import plugins
from agentmerge.contracts.worker import Worker, WorkerSpec
from agentmerge.errors import RecipeRejected
from agentmerge.methods import METHODS, PASSTHROUGH
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import stacked_layers
from agentmerge.system.redaction import remember, revealed

if TYPE_CHECKING:
    from agentmerge.evaluation.tasks import TaskSet

Make = Callable[..., Worker]


def worker_class(spec: WorkerSpec) -> Any:
    """The class of ``spec.kind``: called with (spec, taskset or None); ``tasks(spec)`` gives the
    TaskSet it asks, and ``describe(spec)`` its EngineInfo without building it.

    What else a class may say, of a spec and the models' layout (None where there is none):
        options: what ``worker.options`` takes (``workers.options``).
        reads_models: False where parents are names alone; ``num_layers(spec)`` is their depth then.
        runs_stacks: True where it loads recipes that make other layers than the models have, or
            in another order (``merging.plan.MergePlan.layers``).
        fixed_depth: True where it does so up to the depth that it is built for: that of its
            models and ``extra_layers`` of the spec's options, which come from ``genome.layers``.
        has_canary: True where ``worker.canary_every`` is one of its options.
        conditions(spec): what its answers depend on (``workers.conditions``).
        preflight(spec, layout): faults of a search on it, and notes.
        demand(spec, layout): what a memory plan has to know of it.
    """
    return plugins.load("agentmerge.workers", spec.kind)


def reads_models(kind: str) -> bool:
    """Whether workers of a kind merge models, or know parents by their names alone."""
    return bool(getattr(plugins.load("agentmerge.workers", kind), "reads_models", True))


def refuse_stack(
    recipe: Recipe, num_layers: int, kind: str, worker: Any, extra: int | None = None
) -> None:
    """Raises RecipeRejected for a recipe of other layers than its models' own, in their order,
    where a kind of worker runs none such.

    recipe: canonical. num_layers: the models'. worker: the class, or one of it. extra: how many
        layers more one of a fixed depth was built for.
    """
    layers = stacked_layers(recipe, num_layers) or tuple(range(num_layers))
    in_place = layers == tuple(range(num_layers))
    # a merge may write any layer's weights in any place
    merged = recipe.merge_method != PASSTHROUGH.name and len(layers) == num_layers
    if in_place or merged:
        return
    why, remedy = "keeps those of one model in place", "set worker.kind: hf, or disk"
    if getattr(worker, "runs_stacks", False):
        fixed = getattr(worker, "fixed_depth", False)
        if not fixed or (extra is not None and len(layers) <= num_layers + extra):
            return
        why = f"is built for {num_layers + (extra or 0)}, in their order"
        remedy = f"set genome.layers to {max(len(layers) - num_layers, 1)} or more, or {remedy[4:]}"
    raise RecipeRejected(
        f"the recipe makes a model of {len(layers)} layers out of models of {num_layers}, and the "
        f"{kind} worker {why}; {remedy}"
    )


@dataclass(frozen=True)
class Building:
    """Builds a worker; can be sent to where it lives.

    secrets: what references of a spec stand for besides the environment.
    """

    make: Make | None
    taskset: TaskSet | None
    secrets: Mapping[str, str]

    def __call__(self, spec: WorkerSpec) -> Worker:
        remember(self.secrets)
        for name, body in spec.methods.items():
            METHODS.declare(name, body)
        return (self.make or worker_class(spec))(with_secrets(spec), self.taskset)


def with_secrets(spec: WorkerSpec) -> WorkerSpec:
    """What a worker is built from: its options with the values that they refer to, which no record
    of the spec (an engine's description) holds.

    Raises:
        UserError: a variable that an option names is not set.
    """
    return replace(spec, options=revealed(spec.options, "worker.options"))
