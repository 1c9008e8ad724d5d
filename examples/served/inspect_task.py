"""Scores the served candidate on a task of Inspect AI (inspect-ai), a JSON line an item.

    tasks:
      - name: my_suite
        scorer:
          serve: true
          items: 40
          command: [python, inspect_task.py, "{model}", "{items}", my_suite.py]

Samples without an id are numbered from 1 there; ids of your own must be these numbers. The address
and the key are in the environment, where Inspect's ``openai-api`` provider looks for them.
"""

import json
import os
import sys
import tempfile

# The provider's service is called after the variables that it reads.
os.environ["AGENTMERGE_API_KEY"] = os.environ["OPENAI_API_KEY"]
os.environ["AGENTMERGE_BASE_URL"] = os.environ["OPENAI_BASE_URL"]


def main() -> None:
    from inspect_ai import eval as evaluate
    from inspect_ai.scorer import value_to_float

    model, items, task = sys.argv[1:4]
    folder, file = os.path.split(os.path.abspath(task))
    os.chdir(folder)  # Inspect takes files from below
    number = value_to_float()
    with tempfile.TemporaryDirectory() as logs:
        (log,) = evaluate(
            file,
            model=f"openai-api/agentmerge/{model}",
            sample_id=[int(item) + 1 for item in items.split(",")],
            temperature=0.0,
            log_dir=logs,
            display="none",
        )
        if log.status != "success":
            sys.exit(f"Inspect ended with {log.status}: {log.error and log.error.message}")
        for sample in log.samples or ():
            score = next(iter((sample.scores or {}).values()))
            print(json.dumps({"id": int(sample.id) - 1, "score": number(score.value)}))


if __name__ == "__main__":
    main()
