"""Merges in memory and scores with plain transformers: one live model, and the parents where they
fit (``merging.placement``).

Every load writes the tensors that change straight into the live model and proves the swap: every
expected name exactly once, all finite, and every live tensor read back and equal to what was merged
into it (``merging/live.py``). A stack of copied layers runs on the parents' own tensors
(``stacked.py``). Buffers that the files do not hold are never touched. Knows nothing
of searches.

Options (``worker.options``): ``max_length`` (context in tokens), ``attn_implementation``,
``threads`` (torch's, while it works; by default one for models under 20 million parameters, whose
forward passes are too short to share), ``base`` (the parent others are compared with).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from agentmerge.contracts.worker import (
    EngineInfo,
    Fingerprint,
    Gradient,
    ItemRef,
    ItemResult,
    Loss,
    WorkerSpec,
)
from agentmerge.errors import CandidateFailed, ParentError, RunFailed, WorkerLost
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.loading import quiet
from agentmerge.evaluation.losses import ItemLoss, item_loss
from agentmerge.evaluation.scoring import ItemScorer
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.evaluation.tokenizers import context_length, parent_path, tokenizer_of
from agentmerge.merging.device import current, release
from agentmerge.merging.family import Family
from agentmerge.merging.gradient import MergeGradient
from agentmerge.merging.live import LiveWeights
from agentmerge.merging.memory import device_name, ran_out
from agentmerge.merging.placement import Demand
from agentmerge.parents.headers import read_config, refuse_replaced
from agentmerge.parents.layout import Layout
from agentmerge.parents.skeleton import auto_class, skeleton
from agentmerge.recipe import Recipe
from agentmerge.workers.conditions import conditions, conditions_hash, ends_of, live_parent
from agentmerge.workers.stacked import LiveStack
from agentmerge.workers.targets import live_targets, pairing_faults, parts_of

if TYPE_CHECKING:
    from agentmerge.evaluation.hf_lm import LiveLM

#: Parameters below which a second thread costs more than it brings: on a busy machine of two cores
#: the demo family (0.4 M) scored 8 to 50 times slower with two.
SMALL_MODEL = 20_000_000


class HfWorker:
    """See the module's head; the contract is ``contracts/worker.py``.

    Raises:
        ParentError: the parents cannot be merged, or transformers names their weights otherwise.
    """

    runs_stacks = True

    def __init__(self, spec: WorkerSpec, taskset: TaskSet | None = None) -> None:
        self._spec = spec
        self._info = self.describe(spec)
        self._family = Family.open(
            {name: Path(path) for name, path in spec.parents},
            base=spec.options.get("base"),
            dtype=spec.dtype,
            device=spec.device,
            placement=spec.placement,
            most=spec.resident,
        )
        layout = self._family.layout
        opened = live_parent(spec)
        self._model = open_model(spec, parent_path(spec, opened))
        self._lm = live_lm(spec, self._model)  # first: it may put a tied head's bias elsewhere
        self._live = live_targets(
            self._model,
            layout.by_name,
            layout.carried,
            lambda name: self._family.tensor(opened, name),
        )
        self._places = _places(self._model)
        refuse_replaced(spec.stamps)
        self._threads = threads_for(spec, self._model)
        self._weights = LiveWeights(self._family, self._live)
        self._stack = LiveStack(self._model, self._family, self._live, self._weights.lend)
        self._scorer = ItemScorer(self._lm, taskset or tasks_for(spec))
        self._ready = False
        self._sequences = 0  # that a gradient takes at a time, once memory has run out

    @staticmethod
    def tasks(spec: WorkerSpec) -> TaskSet:
        return tasks_for(spec)

    @staticmethod
    def describe(spec: WorkerSpec) -> EngineInfo:
        return describe("hf", spec)

    @staticmethod
    def demand(spec: WorkerSpec, layout: Layout) -> Demand:
        """As many tensors are merged at a time as torch has threads here."""
        return Demand(threads=threads_of(spec, layout.parameters))

    @staticmethod
    def preflight(spec: WorkerSpec, layout: Layout | None) -> tuple[list[str], list[str]]:
        return preflight(spec, layout)

    @staticmethod
    def conditions(spec: WorkerSpec) -> dict[str, Any]:
        return conditions(spec)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        self._ready = False
        self._scorer.recipe = recipe.hash()
        with self._guarded(), torch.no_grad():
            self._stack.restore()  # its parents need not stay
            plan = self._family.plan(recipe)
            if plan.layers is not None:
                loaded = self._stack.load(plan)
                self._ready = True
                return Fingerprint(plan.digest, loaded.digest, loaded.tensors)
            self._stack.clear()
            loaded = self._weights.load(plan)
        if _places(self._model) != self._places:
            raise RunFailed("the live model's weights are no longer where they were; start anew")
        self._ready = True
        return Fingerprint(plan.digest, loaded.digest, loaded.tensors)

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        if not self._ready:
            raise RunFailed("nothing is loaded: load() a recipe before score()")
        with self._guarded():
            return self._scorer.score(items)

    def gradient(
        self,
        recipe: Recipe,
        items: Sequence[ItemRef],
        loss: Loss = "margin",
        weights: Sequence[float] | None = None,
    ) -> Gradient:
        """``Differentiator.gradient``, at the live weights' own precision.

        Each tensor's gradient is contracted with what the recipe's weights add and freed as it
        appears, so that about one is there at a time. Sequences go through about
        ``worker.batch_size`` at a time, half as many where their activations find no memory; one
        that finds none alone is the recipe's failure, and the worker stays usable.
        """
        self.load(recipe)
        asked = item_loss(self._scorer, self._lm, items, loss, weights)
        size = self._sequences or int(self._lm.batch_size)
        while True:
            slopes = MergeGradient(self._family.plan(recipe), self._family, self._family.statistics)
            try:
                total = self._backward(asked, slopes, size)
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                why = str(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise CandidateFailed(
                    f"no memory on {self._spec.device} for the gradient of one item: {why}"
                )
            size = self._sequences = size // 2
        self._family.verify()
        return Gradient(total, asked.items, slopes.slopes())

    def _backward(self, asked: ItemLoss, slopes: MergeGradient, size: int) -> float:
        """The loss; its gradient goes to ``slopes``, ``size`` sequences at a time."""
        total = 0.0
        held = self._stack.parts() or parts_of(self._model, self._live)
        with self._threaded(), each_gradient(held, slopes.add):
            for part in asked.parts(self._lm, size):
                total += float(part.detach())
                part.backward()  # type: ignore[no-untyped-call]
        return total

    @contextmanager
    def _threaded(self) -> Iterator[None]:
        """The right device, number of threads and precision."""
        before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(self._threads)
        torch.set_float32_matmul_precision(self._spec.matmul_precision)
        try:
            with current(self._spec.device):
                yield
        finally:
            torch.set_num_threads(before)
            torch.set_float32_matmul_precision(precision)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """The right number of threads and precision; out of memory as a lost worker that says what
        to lower."""
        with self._threaded():
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                raise WorkerLost(
                    f"out of memory on {self._spec.device}: {error}; lower worker.batch_size "
                    f"(now {self._spec.batch_size}) or the tasks' context"
                ) from error

    def close(self) -> None:
        self._ready = False
        self._live = {}
        del self._scorer, self._lm, self._weights, self._stack, self._model, self._family
        release(self._spec.device)


def preflight(spec: WorkerSpec, layout: Layout | None) -> tuple[list[str], list[str]]:
    """(faults, notes): whether transformers' class of the models has the tensors of their files.

    layout: None where the models cannot be merged with each other.
    """
    if layout is None or (spec.trust_remote_code and _has_own_code(spec, layout)):
        return [], []  # a model's own code runs when the search does
    opened = Path(dict(spec.parents)[live_parent(spec)])
    try:
        model = skeleton(opened)
    except ParentError as error:
        return [str(error)], []
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    faults = pairing_faults(model, shapes, layout.carried)
    if attention := spec.options.get("attn_implementation"):
        try:
            skeleton(opened, attn_implementation=attention)
        except ParentError as error:
            faults.append(f"worker.options.attn_implementation {attention!r}: {error}")
    return faults, []


def _has_own_code(spec: WorkerSpec, layout: Layout) -> bool:
    return "auto_map" in read_config(Path(dict(spec.parents)[live_parent(spec)]))


def _places(model: Any) -> list[int]:
    """Where each stored tensor of a model is in memory."""
    return [tensor.data_ptr() for tensor in model.state_dict().values()]


def open_model(spec: WorkerSpec, path: Path) -> Any:
    """A model that continues text, in eval mode, on the spec's device and at its dtype.

    Of its generation config only begin, end and padding are kept: what else one parent's file says
    (penalties, suppressed tokens, lengths) is no property of a merge, and vLLM would not heed it.

    Raises:
        RunFailed: there is not memory enough.
    """
    extra = {}
    if "attn_implementation" in spec.options:
        extra["attn_implementation"] = spec.options["attn_implementation"]
    with quiet(), _room_for(path):
        config = transformers.AutoConfig.from_pretrained(
            str(path), trust_remote_code=spec.trust_remote_code
        )
        model = auto_class(config).from_pretrained(
            str(path), dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, **extra
        )
        model.generation_config = transformers.GenerationConfig(**ends_of(path, config))
        return model.to(spec.device).eval().requires_grad_(False)


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Out of memory, which torch and safetensors say in many ways, as one sentence."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise RunFailed(
            f"out of memory while {path} was loaded: {error}; lower worker.count, or raise the "
            "limit (ulimit -v counts address space, of which transformers takes three times the "
            "model's size while it loads)"
        ) from error


def threads_for(spec: WorkerSpec, model: Any) -> int:
    """torch's threads for this model, in this process."""
    return threads_of(spec, sum(parameter.numel() for parameter in model.parameters()))


def threads_of(spec: WorkerSpec, parameters: int) -> int:
    """The same, of a model of so many parameters; several workers share the cores."""
    if "threads" in spec.options:
        return int(spec.options["threads"])
    if parameters < SMALL_MODEL and spec.device == "cpu":
        return 1
    return min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // spec.crowd))


@contextmanager
def each_gradient(
    held: Iterable[tuple[torch.nn.Parameter, Mapping[str, tuple[Any, ...]]]],
    take: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Within: ``take(name, gradient)`` for each tensor that parameters hold (``targets.parts_of``)
    as a backward pass has its parameter's gradient whole, which is freed after that. Parameters
    are left as they were; a buffer has no gradient."""

    def taker(parts: Mapping[str, tuple[Any, ...]]) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                gradient = gradient.contiguous()
                for name, place in parts.items():
                    take(name, gradient.as_strided(*place))

        return hook

    wanted = [(parameter, parts) for parameter, parts in held if parts]
    before = [parameter.requires_grad for parameter, _ in wanted]
    hooks = []
    try:
        for parameter, parts in wanted:
            parameter.requires_grad_(True)
            register: Any = parameter.register_post_accumulate_grad_hook
            hooks.append(register(taker(parts)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (parameter, _), required in zip(wanted, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = None


def live_lm(spec: WorkerSpec, model: Any) -> LiveLM:
    from agentmerge.evaluation.hf_lm import LiveLM

    tokenizer = tokenizer_of(spec)
    return LiveLM(model, tokenizer, spec.batch_size, context_length(spec, tokenizer))


def describe(engine: str, spec: WorkerSpec) -> EngineInfo:
    device = spec.device
    if device.startswith("cuda"):
        device = device_name(device)
    versions = f"transformers {version('transformers')}, torch {torch.__version__}"
    if "attn_implementation" in spec.options:
        versions += f", {spec.options['attn_implementation']}"
    return EngineInfo(
        engine,
        versions,
        device,
        spec.dtype,
        str(spec.batch_size),
        conditions=conditions_hash(spec),
    )
