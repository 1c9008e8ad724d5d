"""One search of mergenetic on a CPU, in an environment that has it and nothing of agentmerge.

    python drive_mergenetic.py ORDER.json

mergenetic is used as its README says, with ``GA`` of pymoo and a problem of one's own ("writing a
single function"): lm-eval's score of the same tasks, which are loaded once. Its ready-made problems
load vLLM, whose releases for its transformers need CUDA, so the model is loaded by its other way,
transformers. Changed is the device: ``device="cpu"``, and where mergenetic has mergekit keep
its tensors ("cuda", asked for without a setting).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def put_on_cpu() -> None:
    import mergekit.merge

    made = mergekit.merge.Executor
    mergekit.merge.Executor = lambda **given: made(**{**given, "storage_device": "cpu"})


def main(order: dict[str, Any]) -> None:
    import numpy
    import pandas
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict
    from mergenetic.merging import TaskArithmeticMerger
    from mergenetic.optimization import MergingProblem
    from mergenetic.searcher import Searcher
    from pymoo.algorithms.soo.nonconvex.ga import GA

    put_on_cpu()
    names = [task["name"] for task in order["tasks"]]
    asked = get_task_dict(names, TaskManager(include_path=order["tasks_dir"]))

    class Demo(MergingProblem):  # type: ignore[misc]
        def metrics_4_genotype(self, model: Any, tokenizer: Any = None) -> Any:
            model = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self.eval_batch_size,
                add_bos_token=True,  # as later releases of lm-eval do where the tokenizer says so
            )
            found = evaluate(model, asked, limit=order["limit"], log_samples=False)["results"]
            score = sum(found[t["name"]][t["metric"]] * t["weight"] for t in order["tasks"])
            print(f"scored {score:.4f}", flush=True)
            return [-float(score)], None

        def test(self) -> None:
            """The answer is scored elsewhere, by the one harness for all."""

    out = Path(order["out"])
    out.mkdir(parents=True, exist_ok=True)
    merger = TaskArithmeticMerger(
        run_id="merged",
        path_to_base_model=order["base"],
        model_paths=order["experts"],
        path_to_store_yaml=str(out / "yaml"),
        path_to_store_merged_model=str(out / "models"),
        dtype=order["dtype"],
    )
    problem = Demo(
        merger,
        search_df=pandas.DataFrame(),
        n_var=len(order["experts"]),
        n_obj=1,
        eval_batch_size=order["batch_size"],
        device="cpu",
        load_in_4bit=False,
    )
    searcher = Searcher(
        problem,
        GA(pop_size=order["population"]),
        str(out),
        n_iter=order["generations"],
        seed=order["seed"],
        run_id="search",
    )
    searcher.search()
    best = numpy.asarray(searcher.result_X)
    merger.merge_model_from_configuration(merger.create_individual_configuration(best))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
