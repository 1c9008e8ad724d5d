"""A config on real models, what decides its answers, and what a search of it would do.

``Prepared`` is what ``prepare`` makes; its facts are kept with a search and compared on resume, and
its plan is what ``check`` shows. Knows no faults and no search state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge import plugins
from agentmerge.config import FIRST, SearchConfig
from agentmerge.contracts.worker import EngineInfo, ItemRef, WorkerSpec
from agentmerge.evaluation.splitting import unsealed
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.ledger import Ledger
from agentmerge.parents.cards import Licence, licence_notes
from agentmerge.parents.chat_templates import shown
from agentmerge.preflight.judges import judge_notes
from agentmerge.preflight.layers import LayersPlan
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.moves import subset
from agentmerge.system.redaction import redacted

if TYPE_CHECKING:  # read only where models are
    from agentmerge.merging.placement import MemoryPlan


@dataclass(frozen=True)
class Prepared:
    """A config on real models: what a search needs before a worker starts.

    identities: model name -> content fingerprint. check: raises RecipeRejected for a recipe that
    these models cannot make. engine, conditions: what answers depend on besides weights and
    questions, as the worker describes it. memory: None where no model is read. made_bytes: on disk,
    of the parents that are no plain checkpoints as they are. notes: what to know of the parents.
    warnings: what in the config or a warm start is most likely a mistake; it goes with the results.
    searched: keys of items that would be sealed, had an earlier search not seen them. parameters:
    of a merge, and of one of its layers; None where no model is read. layers: what a search over
    layers may make; None where there is none. licences: as the parents' cards name them.
    """

    config: SearchConfig
    spec: WorkerSpec
    space: SearchSpace
    taskset: TaskSet
    identities: Mapping[str, str]
    check: Callable[[Recipe], object] = field(repr=False)
    engine: EngineInfo
    conditions: Mapping[str, Any] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    made_bytes: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()
    parameters: tuple[int, int] | None = None
    layers: LayersPlan | None = None
    licences: tuple[Licence, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.spec.parents}

    def without(self, searched: Collection[str]) -> Prepared:
        """The same, none of these items (by key) sealed: an earlier search saw them."""
        sealed = {ref.key for ref in self.taskset.refs("sealed")}
        found = sealed.intersection(searched)
        taskset = unsealed(self.taskset, found)
        return replace(self, taskset=taskset, searched=(*self.searched, *sorted(found)))

    def facts(self) -> dict[str, Any]:
        """What decides answers besides the config; compared on resume."""
        return {
            "identities": dict(self.identities),
            "protocols": {task.name: task.protocol_hash for task in self.taskset.tasks},
            "items": {
                task.name: {
                    "search": len(task.search),
                    "sealed": len(task.sealed),
                    "search_hash": _items_hash(task.part("search")),
                    "sealed_hash": _items_hash(task.part("sealed")),
                }
                for task in self.taskset.tasks
            },
            "num_layers": self.space.num_layers,
            "dtype": self.space.dtype,
            "notes": redacted([*self.notes, *self.taskset.notes]),
            "searched": list(self.searched),
            "objectives": [
                {
                    "name": o.name,
                    "signed_weight": o.signed_weight,
                    "higher_is_better": o.higher_is_better,
                    "leaves": list(o.leaves),
                    "by_size": o.by_size,
                    "mean": self.taskset.is_mean(o),
                    "rebuild": [self.taskset.task(n).rebuild for n in o.leaves],
                    "item_sign": [self.taskset.item_sign(self.taskset.task(n)) for n in o.leaves],
                }
                for o in self.taskset.objectives
            ],
            "engine": asdict(self.engine),
            "conditions": redacted(dict(self.conditions), shapes=False),
            **({"parameters": self.parameters} if self.config.genome.layers else {}),
            **({"judges": judges} if (judges := self._judges) else {}),
        }

    @property
    def _judges(self) -> dict[str, str]:
        """Judged task -> a hash of its judge, under which the ledger has its verdicts."""
        return {name: task.judge_hash for name, task in self.taskset.judged.items()}


@dataclass(frozen=True)
class Plan:
    """What a search would do, for people and for ``check --json``.

    live_model: the parent whose config and tokenizer every merge has; "" where no model is read.
    chat_template: whose template asks; "" where none does.
    """

    dimensions: int
    freedoms: int
    algorithm: str
    population: int
    max_evaluations: int
    items: int
    sealed_items: int
    live_model: str
    chat_template: str
    memory: MemoryPlan | None
    made_bytes: int
    layers: LayersPlan | None
    seconds_per_candidate: float | None
    licences: tuple[Licence, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory and self.memory.to_dict()}


def plan_of(prepared: Prepared, ledger: Ledger | None, settings_hash: str) -> Plan:
    """The plan of a prepared search; time only where this ledger has run the same settings."""
    config = prepared.config
    strategy = plugins.load("agentmerge.strategies", config.algorithm)
    tasks, space = prepared.taskset, prepared.space
    if config.genome.pool is not None:
        space = subset(space, space.pool[: config.genome.pool.most])
    return Plan(
        dimensions=space.dimensions,
        freedoms=space.freedoms,
        algorithm=config.algorithm,
        population=config.generation_size(strategy.population(space.dimensions)),
        max_evaluations=config.budget.max_evaluations,
        items=len(tasks.refs("search")),
        sealed_items=len(tasks.refs("sealed")),
        live_model=prepared.spec.template_model if prepared.conditions else "",
        chat_template=_template_source(prepared),
        memory=prepared.memory,
        made_bytes=prepared.made_bytes,
        layers=prepared.layers,
        seconds_per_candidate=(
            None if ledger is None else ledger.seconds_per_candidate(settings_hash)
        ),
        licences=prepared.licences,
        warnings=prepared.warnings,
        notes=(
            *config.notices,
            *prepared.notes,
            *tasks.notes,
            *licence_notes(prepared.licences),
            *judge_notes(tasks, config.budget.prices or {}),
        ),
    )


def _template_source(prepared: Prepared) -> str:
    asked = any(record.get("template") for record in prepared.taskset.protocols.values())
    source = prepared.config.tasks.chat_template
    if source in (None, FIRST):
        source = prepared.spec.template_model
    return shown(str(source)) if asked else ""


def _items_hash(items: Iterable[ItemRef]) -> str:
    return sha256("".join(item.key for item in items).encode()).hexdigest()[:16]
