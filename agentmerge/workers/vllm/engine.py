"""One vLLM engine: how it is started, asked, given other weights, and ended.

It turns what vLLM does when it fails into our errors: an engine that raised is never used again.
It knows vLLM's public interface (``LLM``); merging inside the engine is ``vllm_extension.py``, and
what is asked is ``vllm_scoring.py``.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from agentmerge import errors
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import AgentmergeError, RunFailed, UserError, WorkerLost
from agentmerge.evaluation.loading import quiet
from agentmerge.merging.device import release
from agentmerge.merging.memory import cuda_devices, device_of, ran_out
from agentmerge.parents.headers import num_layers
from agentmerge.parents.layout import read_layout
from agentmerge.recipe import Recipe
from agentmerge.workers.conditions import remember_environment
from agentmerge.workers.hf import SMALL_MODEL
from agentmerge.workers.vllm.deeper import extra_layers, overrides
from agentmerge.workers.vllm.preflight import (
    GIB,
    batched_tokens,
    config_of,
    head_size,
    placement,
    refused_args,
    share_of,
)

_log = logging.getLogger(__name__)

_CPU_BLOCK = 32
_EXTENSION = "agentmerge.workers.vllm.extension.MergeExtension"
#: Seconds that a call may still take to say why, when the engine's process is dead.
_LAST_WORDS_S = 5
#: How long a new engine waits for an old one's memory, and how often it looks.
_MEMORY_WAIT_S, _MEMORY_LOOK_S = 60, 2
#: Length of a greedy answer of the self-test, in tokens.
PROBE_TOKENS = 12
_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: The runner is pinned: the second one is the default on a GPU, and nothing here was tested on it.
_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


def engine_args(spec: WorkerSpec, longest: int) -> dict[str, Any]:
    """What ``vllm.LLM`` is built with; ``worker.engine_args`` wins where it may.

    longest: tokens of the longest request, its answer included.

    Raises:
        UserError: an entry of ``worker.engine_args`` that is not the user's to choose.
    """
    asked: Mapping[str, Any] = spec.options.get("engine_args") or {}
    if faults := refused_args(spec):
        raise UserError("\n".join(faults))
    path = dict(spec.parents)[spec.template_model]
    ranks = spec.ranks
    if ranks > 1 and multiprocessing.current_process().daemon:
        raise UserError(
            f"worker.engine_args.tensor_parallel_size {ranks} is not possible on this worker.host: "
            "its processes may start no others; use process or ray"
        )
    longest = int(asked.get("max_model_len") or longest)
    args: dict[str, Any] = {
        "model": path,
        "tokenizer": path,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "worker_extension_cls": _EXTENSION,
        "max_model_len": longest,
        "max_num_seqs": spec.batch_size,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    config = config_of(spec)
    vocabulary = int(config.get("vocab_size") or 0)
    args["max_num_batched_tokens"] = max(batched_tokens(vocabulary), spec.batch_size)
    if spec.device == "cpu":
        blocks = spec.batch_size * (-(-longest // _CPU_BLOCK) + 1)
        args |= {
            "enforce_eager": True,
            "block_size": _CPU_BLOCK,
            "kv_cache_memory_bytes": blocks * _CPU_BLOCK * _token_bytes(config, spec.dtype),
        }
    elif "kv_cache_memory_bytes" not in asked:
        layout = read_layout({name: Path(path) for name, path in spec.parents})
        args["gpu_memory_utilization"] = share_of(spec, layout).utilization
    return args | dict(asked) | overrides(spec)


def _token_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of keys and values that one token takes in the cache."""
    kv_heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 1
    width = 4 if dtype == "float32" else 2
    return int(2 * num_layers(config) * kv_heads * head_size(config) * width)


class Engine:
    """A live engine with the parents beside its model.

    probes: prompts for the self-test, as tokens. way: how weights get in; reason: why not by map.

    Raises:
        ParentError: the parents cannot be merged.
        RunFailed: vLLM cannot run this model, or no swap into it could be proved.
        WorkerLost: the engine died.
    """

    def __init__(self, spec: WorkerSpec, longest: int, probes: Sequence[list[int]]) -> None:
        self._spec = spec
        self._salt = ""
        self._llm: Any = None
        self._processes: set[Any] = set()
        args = engine_args(spec, longest)
        self._threads = _threads(spec)
        others = set(multiprocessing.active_children())
        _wait_for_memory(spec, args)
        with self._guarded("start"), _started(spec):
            from vllm import LLM

            self._llm = LLM(**args)
        #: Beyond them vLLM refuses a token, which ends the engine's whole batch.
        self.token_rows: int = self._llm.llm_engine.model_config.get_vocab_size()
        self._processes = set(multiprocessing.active_children()) - others
        options = {
            "parents": dict(spec.parents),
            "base": spec.options.get("base"),
            "dtype": spec.dtype,
            "way": spec.options.get("way"),
            "placement": placement(spec),
            "most": spec.resident,
            "extra_layers": extra_layers(spec),
            "methods": spec.methods,
        }
        facts = self._call("agentmerge_open", options)
        self.way: str = facts["way"]
        self.reason: str = facts["reason"]
        room = args["max_model_len"] - PROBE_TOKENS
        self._test(Recipe.parse(facts["test"]), [prompt[-room:] for prompt in probes if room > 0])

    def load(self, recipe: Recipe) -> dict[str, Any]:
        """Merge ``recipe`` into the live weights, and forget what was computed with the old ones.

        Raises:
            CandidateFailed: the recipe's fault.
            RunFailed: the live weights are not the merged ones.
            WorkerLost: the engine failed, and must be built anew.
        """
        report = self._call("agentmerge_load", recipe.to_dict(), self.way)
        with self._guarded("empty its caches"):
            if not self._waited(self._llm.reset_prefix_cache):
                raise WorkerLost("vLLM could not empty its prefix cache: a request is running")
            self._waited(self._llm.reset_mm_cache)
            self._waited(self._llm.llm_engine.reset_encoder_cache)
        self._salt = report["digest"]
        return report

    def _test(self, recipe: Recipe, probes: Sequence[list[int]]) -> None:
        """The map against vLLM's own loader, on this machine: one parent by both, with everything
        zeroed in between; parameters and greedy answers must be equal. Else it is not used."""
        if self.way != "map":
            return
        self.way = "reload"
        self.load(recipe)
        said, again = self.greedy(probes), self.greedy(probes)
        state = self._each("agentmerge_state")
        self._each("agentmerge_zero")
        self.way = "map"
        self.load(recipe)
        if state != self._each("agentmerge_state"):
            self._fall_back("parameters differ from those after vLLM's own loading")
        elif said != again:  # kernels that add in another order each time
            _log.warning(
                "vLLM's greedy answers differ from run to run on this device, so only parameters "
                "could be compared after merging in place; VLLM_BATCH_INVARIANT=1 makes them equal"
            )
        elif said != self.greedy(probes):
            self._fall_back("greedy answers differ from those after vLLM's own loading")
        self._each("agentmerge_zero")

    def _fall_back(self, reason: str) -> None:
        self.way, self.reason = "reload", reason
        _log.warning("merged weights go in by vLLM's own reload, which is slower: %s", reason)

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """What the live model says after each prompt, as tokens; decoding graphs included."""
        with vllm_imported():
            from vllm import SamplingParams
        settings = SamplingParams(temperature=0, max_tokens=PROBE_TOKENS, ignore_eos=True)
        outputs = self.ask(prompts, [settings] * len(prompts))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def ask(self, prompts: Sequence[list[int]], settings: Sequence[Any]) -> list[Any]:
        """vLLM's outputs, in order. No answer of other weights can be read from its cache."""
        if not prompts:
            return []
        asked = [{"prompt_token_ids": p, "cache_salt": self._salt} for p in prompts]
        with self._guarded("score"):
            outputs: list[Any] = self._waited(
                lambda: self._llm.generate(asked, list(settings), use_tqdm=False)
            )
        return outputs

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is None:
            return
        with suppress(Exception), quiet():  # it may be dead already
            self._waited(llm.llm_engine.engine_core.shutdown)
        del llm
        gc.collect()
        release(self._spec.device)

    def _call(self, method: str, *args: Any) -> dict[str, Any]:
        """The report that all ranks agree on; errors as they were raised there."""
        reports = self._each(method, *args)
        for report in reports:
            if "error" in report:
                kind = getattr(errors, report["error"], RunFailed)
                raise kind(report["message"])
        timeless = [{k: v for k, v in r.items() if not k.endswith("_s")} for r in reports]
        if any(report != timeless[0] for report in timeless):
            raise RunFailed(f"the ranks of the engine do not agree: {timeless}")
        found: dict[str, Any] = reports[0]
        return found

    def _each(self, method: str, *args: Any) -> list[Any]:
        """What each rank answers."""
        with self._guarded(method.removeprefix("agentmerge_")):
            found: list[Any] = self._waited(lambda: self._llm.collective_rpc(method, args=args))
        return found

    def _waited(self, call: Callable[[], Any]) -> Any:
        """What a call gives; vLLM may wait for ever for a process that was killed meanwhile."""
        if not self._processes:
            return call()
        done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                done.put((call(), None))
            except Exception as error:
                done.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        while True:
            dead = [process for process in self._processes if not process.is_alive()]
            try:
                found, error = done.get(timeout=_LAST_WORDS_S if dead else 1)
            except queue.Empty:
                if dead:
                    raise ChildProcessError(
                        f"its process died (exit code {dead[0].exitcode})"
                    ) from None
                continue
            if error is not None:
                raise error
            return found

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Whatever vLLM raises: its engine may be half-way between two models, so it is lost."""
        if self._llm is None and what != "start":
            raise WorkerLost("the vLLM engine is gone")
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            with quiet():
                yield
        except AgentmergeError:
            raise
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            if what == "start" and isinstance(error, ValueError) and not _lacks_memory(error):
                raise RunFailed(f"vLLM cannot run this model: {reason[:600]}") from error
            if ran_out(error):
                reason += f"; lower {_lower(self._spec)}"
            raise WorkerLost(f"the vLLM engine failed to {what}: {reason[:600]}") from error
        finally:
            torch.set_num_threads(before)


def _lacks_memory(error: Exception) -> bool:
    """Whether vLLM says that the GPU has not the memory free that it was told to take."""
    return "free memory on device" in str(error).lower()


def _wait_for_memory(spec: WorkerSpec, args: Mapping[str, Any]) -> None:
    """Until the GPU has free what the engine is told to take: one that has just died may not have
    given all back yet.

    Raises:
        WorkerLost: it has not, after ``_MEMORY_WAIT_S``.
    """
    share = args.get("gpu_memory_utilization")
    if spec.device == "cpu" or share is None:
        return
    end = time.monotonic() + _MEMORY_WAIT_S
    while True:
        found = device_of(spec.device)
        wanted = share * found.total_bytes
        if found.free_bytes + GIB >= wanted:  # who looks takes up to 1 GiB itself
            return
        if time.monotonic() > end:
            raise WorkerLost(
                f"the vLLM engine is to take {wanted / GIB:.1f} GiB of {found.name}, of which "
                f"{found.free_bytes / GIB:.1f} are free after {_MEMORY_WAIT_S} s: end what else "
                "uses it, or lower worker.engine_args.gpu_memory_utilization"
            )
        time.sleep(_MEMORY_LOOK_S)


def _apart(spec: WorkerSpec) -> bool:
    """Whether the engine has a process of its own; a pool's worker process may have no children."""
    wanted = bool(spec.options.get("engine_process", spec.device != "cpu"))
    return wanted and not multiprocessing.current_process().daemon


def _threads(spec: WorkerSpec) -> int | None:
    """torch's threads while an engine in this process works, where they are not left as they are:
    a small model's forward passes are too short to share."""
    if "threads" in spec.options:
        return int(spec.options["threads"])
    layout = read_layout({name: Path(path) for name, path in spec.parents})
    return 1 if layout.parameters < SMALL_MODEL and not _apart(spec) else None


def _lower(spec: WorkerSpec) -> str:
    advice = (
        f"worker.batch_size (now {spec.batch_size}), worker.engine_args.gpu_memory_utilization or "
        "worker.engine_args.max_num_batched_tokens"
    )
    if spec.device == "cpu":
        return advice
    layout = read_layout({name: Path(path) for name, path in spec.parents})
    return f"{advice}; the forecast was: {share_of(spec, layout)}"


@contextmanager
def vllm_imported() -> Iterator[None]:
    """Import anything of vLLM inside this: it reads its environment then, and says much."""
    remember_environment()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with quiet():
        yield


@contextmanager
def _started(spec: WorkerSpec) -> Iterator[None]:
    """What an engine looks at while it starts; torch's thread setting is left as it was."""
    in_place = bool(spec.options.get("in_place", True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(_apart(spec)))
    os.environ["AGENTMERGE_VLLM_IN_PLACE"] = str(int(in_place))
    ranks = spec.ranks
    if spec.device == "cpu" and ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores(ranks))
    from agentmerge.workers.vllm.extension import SEARCH, keep_in_place

    visible, before = _visible(spec), os.environ.get(_VISIBLE)
    if visible is not None:
        os.environ[_VISIBLE] = visible
    os.environ[SEARCH] = str(os.getpid())
    keep_in_place(in_place)  # it may have been imported before
    _hide_from_inspection()
    set_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        os.environ.pop(SEARCH, None)
        _restore("LD_PRELOAD", preload)  # meant for the engine's own processes
        if visible is not None and _apart(spec):
            _restore(_VISIBLE, before)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _visible(spec: WorkerSpec) -> str | None:
    """The GPUs that an engine may see: its own, which it takes for the first ones; None on a CPU.

    Raises:
        UserError: there are not so many from its first one on, or this process has begun to use
            another one already.
    """
    if spec.device == "cpu":
        return None
    first, ranks = torch.device(spec.device).index or 0, spec.ranks
    given = os.environ.get(_VISIBLE)
    names = given.split(",") if given else [str(place) for place in range(cuda_devices())]
    own = names[first : first + ranks]
    if len(own) < ranks:
        raise UserError(
            f"worker.device {spec.device} and worker.engine_args.tensor_parallel_size {ranks} need "
            f"GPUs {first} to {first + ranks - 1}; this process sees {len(names)}"
        )
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if first and begun and not _apart(spec):
        raise UserError(
            f"worker.device {spec.device} cannot be taken in a process that uses a GPU already; "
            "leave worker.options.engine_process out"
        )
    return ",".join(own)


def _cores(ranks: int) -> str:
    """An equal part of this process's cores for each rank; vLLM itself only knows how to give each
    a NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    if not share:
        return "nobind"
    parts = (cores[rank * share : (rank + 1) * share] for rank in range(ranks))
    return "|".join(",".join(map(str, part)) for part in parts)


def _hide_from_inspection() -> None:
    """vLLM asks every object of every module for ``__dict__``; llvmlite's library (of numba) takes
    that for a function of its own and answers."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    kind: Any = type(getattr(ffi, "lib", None))
    answer = getattr(kind, "__getattr__", None)
    if answer is None or hasattr(answer, "agentmerge"):
        return

    def without_own(library: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(library, name)

    without_own.agentmerge = True  # type: ignore[attr-defined]
    kind.__getattr__ = without_own
