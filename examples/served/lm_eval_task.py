"""Scores the served candidate on an lm-eval task by lm-eval's own API models, a JSON line an item.

tasks:
  - name: my_task_served
    scorer:
      serve: true
      items: 60
      command: [python, lm_eval_task.py, "{base_url}", "{model}", "{items}", my_task, acc,
                --tokenizer, models/base, --include-path, tasks]
"""

import argparse
import json
import sys
from typing import Any


def main() -> None:
    asked = argparse.ArgumentParser()
    for name in ("base_url", "model", "items", "task", "metric"):
        asked.add_argument(name)
    asked.add_argument("--tokenizer", required=True, help="the folder of one of the models")
    asked.add_argument("--include-path", help="your own task files")
    asked.add_argument("--filter", default="none")
    asked.add_argument("--chat", action="store_true", help="ask /chat/completions")
    told = asked.parse_args()

    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(told.tokenizer)
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # as the model was taught

    kind = "local-chat-completions" if told.chat else "local-completions"
    arguments: dict[str, Any] = {
        "model": told.model,
        "base_url": f"{told.base_url}/{'chat/' if told.chat else ''}completions",
        "tokenizer": told.tokenizer,
        "tokenizer_backend": "huggingface",
        "add_bos_token": begins,
        "max_retries": 1,
    }
    found = lm_eval.simple_evaluate(
        kind,
        model_args=arguments,
        tasks=[told.task],
        samples={told.task: sorted(int(item) for item in told.items.split(","))},
        task_manager=TaskManager(
            include_path=told.include_path, include_defaults=told.include_path is None
        ),
        apply_chat_template=told.chat,
        bootstrap_iters=0,
    )
    assert found is not None
    for sample in found["samples"][told.task]:
        if sample["filter"] == told.filter:
            line = {"id": sample["doc_id"], "score": float(sample[told.metric])}
            print(json.dumps(line), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
