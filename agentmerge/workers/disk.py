"""The old way: write the merge to disk, score it in a fresh process, delete it.

Slow and simple: the child loads the checkpoint as anyone would, so this is also the oracle for
workers that swap weights in place. The parent process holds no model.

Options (``worker.options``): those of the hf worker, ``evaluate_with`` ("vllm": the process starts
a vLLM engine on the checkpoint, and the vllm worker's options count), and ``storage`` (where
checkpoints go until they are scored; by default the system's temporary directory).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agentmerge import plugins
from agentmerge.contracts.worker import EngineInfo, Fingerprint, ItemRef, ItemResult, WorkerSpec
from agentmerge.errors import AgentmergeError, RunFailed, WorkerLost
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.merging.device import release
from agentmerge.merging.export import export_checkpoint
from agentmerge.merging.placement import Demand
from agentmerge.merging.plan import plan
from agentmerge.parents.headers import refuse_replaced
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.recipe import Recipe
from agentmerge.system.temporary import TemporaryFolder


class DiskWorker:
    """See the module's head; the contract is ``contracts/worker.py``."""

    runs_stacks = True

    def __init__(self, spec: WorkerSpec, taskset: TaskSet | None = None) -> None:
        self._spec = spec
        self._paths = {name: Path(path) for name, path in spec.parents}
        self._base = spec.options.get("base")
        self._layout = read_layout(self._paths, self._base)
        self._info = self.describe(spec)
        scratch = TemporaryFolder("agentmerge-disk", spec.options.get("storage"))
        self._scratch = scratch.path
        self._remove = weakref.finalize(self, scratch.close)
        self._loaded: tuple[Path, Fingerprint, tuple[str, ...], str] | None = None

    @staticmethod
    def tasks(spec: WorkerSpec) -> TaskSet:
        return tasks_for(spec)

    @staticmethod
    def demand(spec: WorkerSpec, layout: Layout) -> Demand:
        """Parents are read from their files, and a process of its own scores."""
        return Demand(("stream",), processes=2)

    @staticmethod
    def describe(spec: WorkerSpec) -> EngineInfo:
        found: EngineInfo = _scorer(spec).describe(spec)
        return replace(found, engine="disk")

    @staticmethod
    def conditions(spec: WorkerSpec) -> dict[str, Any]:
        found: dict[str, Any] = _scorer(spec).conditions(spec)
        return found

    @staticmethod
    def preflight(spec: WorkerSpec, layout: Layout | None) -> tuple[list[str], list[str]]:
        found: tuple[list[str], list[str]] = _scorer(spec).preflight(spec, layout)
        return found

    @property
    def info(self) -> EngineInfo:
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        self._delete()
        planned = plan(recipe, self._layout, dtype=self._spec.dtype)
        target = self._scratch / "candidate"
        exported = export_checkpoint(
            recipe,
            self._paths,
            target,
            template_model=self._spec.template_model,
            base=self._base,
            dtype=self._spec.dtype,
            device=self._spec.device,
        )
        release(self._spec.device)  # it is the scoring process's now
        refuse_replaced(self._spec.stamps)
        fingerprint = Fingerprint(planned.digest, exported.digest, exported.tensors)
        names = tuple(item.spec.name for item in planned.tensors)
        self._loaded = (target, fingerprint, names, recipe.hash())
        return fingerprint

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        if self._loaded is None:
            raise RunFailed("nothing is loaded: load() a recipe before score()")
        path, fingerprint, names, recipe_hash = self._loaded
        answer = self._scratch / "answer.pickle"
        answer.unlink(missing_ok=True)
        task = {
            "spec": self._spec,
            "path": path,
            "digest": fingerprint.digest,
            "names": names,
            "carried": self._layout.carried,
            "items": tuple(items),
            "recipe": recipe_hash,
            "answer": answer,
            "threads": torch.get_num_threads(),
        }
        here = str(Path(__file__).parents[2])
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "agentmerge.workers.disk_eval"],
            input=pickle.dumps(task),
            capture_output=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C drains the search, not its workers; one that is ended takes this with it.
            start_new_session=multiprocessing.parent_process() is None,
        )
        if done.returncode != 0 or not answer.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            raise WorkerLost(
                f"the evaluation process died (exit code {done.returncode}): {' / '.join(said)}"
            )
        found: Any = pickle.loads(answer.read_bytes())
        if isinstance(found, AgentmergeError):
            raise found
        results: list[ItemResult] = found
        return results

    def close(self) -> None:
        self._loaded = None
        self._remove()

    def _delete(self) -> None:
        if self._loaded is not None:
            shutil.rmtree(self._loaded[0], ignore_errors=True)
            self._loaded = None


def _scorer(spec: WorkerSpec) -> Any:
    """The class of worker whose engine scores in the process of its own."""
    return plugins.load("agentmerge.workers", spec.options.get("evaluate_with", "hf"))
