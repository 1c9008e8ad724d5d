"""The fresh process of the disk worker: loads a checkpoint, proves it, scores items, ends.

Reads one pickled task from standard input and leaves the results, or the error that the user or
the candidate is to blame for, in a file; a crash leaves none.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from agentmerge.workers.processes import end_with


def evaluate(task: dict[str, Any]) -> Any:
    import torch

    from agentmerge.errors import AgentmergeError

    spec = task["spec"]
    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision(spec.matmul_precision)
    try:
        return _BY[spec.options.get("evaluate_with", "hf")](spec, task)
    except AgentmergeError as error:
        return error


def _by_transformers(spec: Any, task: dict[str, Any]) -> Any:
    import torch

    from agentmerge.errors import RunFailed
    from agentmerge.evaluation.building import tasks_for
    from agentmerge.evaluation.scoring import ItemScorer
    from agentmerge.merging.digests import digest
    from agentmerge.merging.weights import ParentFiles
    from agentmerge.workers.hf import live_lm, open_model, threads_for
    from agentmerge.workers.targets import live_targets

    model = open_model(spec, task["path"])
    torch.set_num_threads(threads_for(spec, model))
    files = ParentFiles({"": task["path"]}, spec.device)
    targets = live_targets(
        model, task["names"], task["carried"], lambda name: files.tensor("", name)
    )
    live = digest(targets.items())
    if live != task["digest"]:
        raise RunFailed(
            f"the checkpoint's weights ({live}) are not the merged ones ({task['digest']}): "
            "transformers loads this model otherwise than its files say"
        )
    taskset = tasks_for(spec, check_built_ins=False)
    scorer = ItemScorer(live_lm(spec, model), taskset)
    scorer.recipe = task["recipe"]
    return scorer.score(task["items"])


def _by_vllm(spec: Any, task: dict[str, Any]) -> Any:
    """An engine started on the checkpoint, which is also its only parent."""
    from dataclasses import replace

    from agentmerge.config import FIRST
    from agentmerge.errors import RunFailed
    from agentmerge.evaluation.building import tasks_for
    from agentmerge.evaluation.tokenizers import tokenizer_of
    from agentmerge.parents.layout import read_layout
    from agentmerge.recipe import Recipe
    from agentmerge.workers.vllm.worker import VllmWorker

    options = spec.options | {"base": None, "canary_every": 0}
    tasks = spec.tasks
    if tasks.chat_template not in (None, FIRST):  # it may name a parent, which is none here
        template = tokenizer_of(spec).get_chat_template()
        tasks = tasks.model_copy(update={"chat_template": template})
    alone = replace(
        spec,
        parents=(("merge", str(task["path"])),),
        template_model="merge",
        tasks=tasks,
        options=options,
    )
    depth = read_layout({"merge": task["path"]}).num_layers
    worker = VllmWorker(alone, tasks_for(spec, check_built_ins=False))
    live = worker.load(Recipe.of_model("merge", depth).canonical(depth)).digest
    if live != task["digest"]:
        raise RunFailed(
            f"the checkpoint's weights ({live}) are not the merged ones ({task['digest']})"
        )
    worker._scorer.recipe = task["recipe"]
    return worker.score(task["items"])


_BY = {"hf": _by_transformers, "vllm": _by_vllm}


def main() -> None:
    end_with(os.getppid())
    task = pickle.loads(sys.stdin.buffer.read())
    answer: Path = task["answer"]
    scratch = answer.with_suffix(".part")
    scratch.write_bytes(pickle.dumps(evaluate(task)))
    os.replace(scratch, answer)


if __name__ == "__main__":
    main()
