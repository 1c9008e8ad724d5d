"""The contract of a worker, and the plain values that cross it.

A worker loads one recipe at a time and scores items on it. It is built from a ``WorkerSpec`` that
can be pickled, so a pool may start it in this process, in a process of its own, or on another
machine. It knows nothing of searches, budgets or databases.

Every worker passes ``agentmerge.testing.WorkerSuite``:
    load() of a recipe, then score(), gives the same results whatever was loaded before;
    load() of a bad recipe raises CandidateFailed and the next load() works;
    score() returns one ItemResult an item, in the order asked;
    gradient(), where there is one, leaves the recipe's weights live, bit for bit as load() does;
    a log-likelihood or a loss that is not finite raises CandidateFailed;
    a worker that died raises WorkerLost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from agentmerge.config import TasksConfig
from agentmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ItemRef:
    """One scored item: task name, index into the task's documents, hash of what it asks."""

    task: str
    index: int
    key: str


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What one item showed.

    value: the metric's raw value (0 or 1 for accuracy; the summed log-likelihood in nats for
        perplexities; the predicted class for f1 and mcc).
    log_likelihood: of the gold answer in nats, or None where the task has no one gold answer.
    margin: how far the gold answer is ahead, in nats; None where undefined. Its kind is the
        task's ``margin_kind``: "choice" (gold minus best wrong choice) or "token" (least over
        answer tokens of gold minus best other log-probability, teacher-forced).
    truncated: the prompt was cut to fit the context. cut_off: generation ended at max_gen_toks.
    whole: all that the item gives to a metric of whole answers (BLEU), as JSON; the value is then
        that metric of this item alone, 0 where it has none.
    tokens: how many the model generated for it, 0 where nothing is generated; None where nobody
        counted (results of before they were kept).
    answers: what was said, turn by turn, or which choice was made; where a judge is still to say
        what it is worth, the value is NaN until then. Of few items they are kept (see
        ``evaluation.failing``). reasons: a judge's, turn by turn, or a program's, "" where
        there is none.
    missing: the judge gave no verdict; the value stays NaN, and the item counts for nothing.
    """

    value: float
    log_likelihood: float | None = None
    margin: float | None = None
    truncated: bool = False
    cut_off: bool = False
    tokens: int | None = None
    answers: tuple[str, ...] = ()
    missing: bool = False
    whole: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Proof of a swap: the recipe's plan hash, a digest of the live weights, how many tensors."""

    recipe: str
    digest: str
    tensors: int


#: What an item's gradient is of, in nats. "log_likelihood": minus the log-likelihood of the gold
#: answer, summed over its tokens. "margin": log(1 + exp(-margin)), the cross-entropy of gold
#: against its nearest rival; of a text without rivals, minus its log-likelihood a token.
Loss = Literal["log_likelihood", "margin"]


@dataclass(frozen=True, slots=True)
class TensorSlope:
    """d loss / d every weight that made one tensor, masks and elected signs held as they were.

    tensor, layer, after: as ``Recipe.effective`` has them. weights: (model, slope) of each source
        with a weight, at the values that ``effective`` gives. scale: d loss / d lambda, 0 where the
        method has none.
    """

    tensor: str
    layer: int | None
    after: bool
    weights: tuple[tuple[str, float], ...]
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class Gradient:
    """The slope of a loss in everything that weighs the parents of a merge, from one pass.

    It is kept tensor by tensor, so that it can be read in any space that holds the recipe, however
    fine (``strategies.chain_rule``).

    loss: the weighted mean over the items. items: how many had a gold answer; the others count for
        nothing.
    """

    loss: float
    items: int
    tensors: tuple[TensorSlope, ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Everything about a worker that can change an answer; part of the ledger's key.

    conditions: a hash of what else answers depend on (``workers.conditions``); "" for a worker that
        reads no model, and in results of before it was recorded.
    """

    engine: str
    version: str
    device: str
    dtype: str
    batch_size: str
    tensor_parallel: int = 1
    scoring: str = "lm-eval"
    conditions: str = ""


@dataclass(frozen=True, slots=True)
class Sources:
    """How another machine comes by the same parents.

    identities: the user's model name -> content fingerprint. roots: folders to look for them in.
    tokenizer_source, allow_pickle: the config's, for what has to be made of them.
    """

    identities: tuple[tuple[str, str], ...]
    roots: tuple[str, ...] = ()
    tokenizer_source: str | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to build a worker: plain values only.

    parents: the user's model name -> local directory.
    template_model: the parent whose tokenizer (and chat template) asks the questions.
    placement: where parents are kept (``merging.placement``); "auto" looks at what is free when
        the worker starts, and counts on being the only one.
    method: the search's merge method, for what merging takes; None where it is not known.
    crowd: how many such workers share the device.
    methods: the config's own merge methods, as ``methods.MethodTable.declare`` takes them.
    stamps: of the parents' files when they were identified (``merging.headers.stamps_of``); a
        worker that finds others refuses to work.
    matmul_precision: torch's ``float32_matmul_precision`` while the worker computes; processes of
        its own do not inherit what the caller has set.
    resident: so many parents are merged at a time (of a pool, with the base), so that no more stay
        in memory; None for all.
    sources: what its parents are, for a machine that has them elsewhere; None where they are names.
    options: the worker's own settings from the config's ``worker`` section.
    """

    kind: str
    parents: tuple[tuple[str, str], ...]
    template_model: str
    tasks: TasksConfig
    dtype: str
    batch_size: int
    device: str = "cpu"
    trust_remote_code: bool = False
    placement: Literal["auto", "device", "host", "stream"] = "auto"
    stamps: tuple[tuple[str, tuple[int, int, int, int]], ...] = ()
    matmul_precision: str = "highest"
    options: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    crowd: int = 1
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: Sources | None = None
    resident: int | None = None

    @property
    def ranks(self) -> int:
        """Devices that the worker takes."""
        args = self.options.get("engine_args") or {}
        return int(args.get("tensor_parallel_size") or 1)


@runtime_checkable
class Worker(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def load(self, recipe: Recipe) -> Fingerprint:
        """Make ``recipe`` (canonical) the live model.

        Raises:
            CandidateFailed: this recipe cannot be merged; the worker stays usable.
            WorkerLost: the worker is gone.
        """
        ...

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        """Score items on the live model, one result an item, in the order asked."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Differentiator(Worker, Protocol):
    """A worker that can also tell how its loss changes with a recipe's weights."""

    def gradient(
        self,
        recipe: Recipe,
        items: Sequence[ItemRef],
        loss: Loss = "margin",
        weights: Sequence[float] | None = None,
    ) -> Gradient:
        """Load ``recipe`` and take its loss's gradient in one pass over items.

        weights: what each item's loss counts, by default the same; divided by the sum of their
            absolute values. Negative: that item should get worse.

        Raises:
            CandidateFailed: the recipe cannot be merged, its method has no weights to take a
                gradient of, no item has a gold answer, or the loss is not finite.
            WorkerLost: the worker is gone.
        """
        ...


#: Builds a worker where it is called; it can be pickled.
Build = Callable[[WorkerSpec], Worker]


class Hosted(Protocol):
    """One worker where a host has it, perhaps not built yet."""

    def ready(self) -> Worker:
        """The worker once it is built, which takes as long as loading its models does.

        Raises:
            WorkerLost: it died meanwhile; or what building it raised.
        """
        ...

    def end(self) -> None:
        """At once, whatever it does: whoever waits for it gets ``WorkerLost``. Only where workers
        are ``apart``; may be called from any thread."""
        ...

    def close(self) -> None:
        """Close the worker, if there is one, and leave nothing of it behind.

        Raises:
            RunFailed: a worker that looks back at its end found its answers wrong.
        """
        ...


class Host(Protocol):
    """Where workers live; a plugin's entry point is the class. Built once a search, with how many
    workers it is going to have.

    apart: they share no memory with the search, and can be ended while they work. What is not apart
        has one worker, and no deadline.

    What a class may say besides: ``places``, True where it shares out devices itself, so that each
    worker is told the search's own (``cuda``); ``settled(settings)``, what is built with the count
    in its place, given a config's worker section; ``faults(settings)``, why it cannot be had;
    ``room(settings, device)``, for how many workers on such devices (``worker.count: auto``);
    ``keeps``, False where a worker is for one candidate.
    """

    apart: bool

    def __init__(self, count: int) -> None: ...

    def start(self, spec: WorkerSpec, build: Build) -> Hosted:
        """Begin a worker and return; from several threads.

        Raises:
            WorkerLost: it cannot be started.
            NoRoom: not now, and not here; so may ``ready`` say.
        """
        ...

    def close(self) -> None:
        """After every worker's own."""
        ...
