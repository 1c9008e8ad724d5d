"""The protocol hash changes with what is asked and how, and with nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny

from agentmerge.evaluation.building import build_tasks
from agentmerge.evaluation.protocol import tokenizer_identity


def hash_of(tasks_dir: Path, name: str = "tiny_filtered", **changes: Any) -> str:
    tokenizer = changes.pop("tokenizer", None) or tiny.tokenizer()
    context = changes.pop("context", 96)
    taskset = build_tasks(
        tiny.tasks_config(tasks_dir, name, **changes),
        tokenizer,
        template_source="a",
        context=context,
        check_built_ins=False,
    )
    return taskset.tasks[0].protocol_hash


def test_what_changes_the_protocol(tasks_dir: Path) -> None:
    chat, other = tiny.tokenizer(tiny.TEMPLATE), tiny.tokenizer(tiny.TEMPLATE.replace("#", "!"))
    hashes = [
        hash_of(tasks_dir),
        hash_of(tasks_dir, num_fewshot=1),
        hash_of(tasks_dir, context=48),
        hash_of(tasks_dir, companion=False),
        hash_of(tasks_dir, "tiny_filtered=exact_match,none"),
        hash_of(tasks_dir, apply_chat_template=True, tokenizer=chat),
        hash_of(tasks_dir, apply_chat_template=True, tokenizer=other),
        hash_of(tasks_dir, apply_chat_template=True, tokenizer=chat, fewshot_as_multiturn=False),
    ]
    assert len(set(hashes)) == len(hashes)


def test_decoding_and_task_code_change_it(tmp_path: Path) -> None:
    docs = [{"q": "ab=", "gold": "a"}] * 3
    seen = []
    for n, code in ((3, "x"), (4, "x"), (4, "y")):
        (tmp_path / "code.py").write_text(
            f"HELPER = '{code}'\n"
            "def judge(doc, results):\n    return {'ok': results[0] != HELPER}\n"
        )
        path = tiny.write_task(
            tmp_path,
            "judged",
            docs,
            "generate_until",
            doc_to_target="gold",
            generation_kwargs={"until": ["\n"], "max_gen_toks": n},
            metric_list=[{"metric": "ok", "aggregation": "mean", "higher_is_better": True}],
        )
        path.write_text(path.read_text() + "process_results: !function code.judge\n")
        seen.append(hash_of(tmp_path, "judged=ok,none"))
    assert len(set(seen)) == 3


def test_what_does_not_change_it(tasks_dir: Path, tmp_path: Path, parent: Path) -> None:
    first = hash_of(tasks_dir)
    assert first == hash_of(tasks_dir, limit=5)
    assert first == hash_of(tasks_dir, shuffle=True, sealed_share=0.5, seed=3)
    # a template that is not applied, a weight, and where the files lie
    assert first == hash_of(tasks_dir, tokenizer=tiny.tokenizer(tiny.TEMPLATE))
    assert first == hash_of(tiny.write_tasks(tmp_path / "elsewhere", parent))
    assert hash_of(tasks_dir, "tiny_choice") == hash_of(tasks_dir, "tiny_choice", companion=False)


def test_it_is_the_same_in_another_process(tasks_dir: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_protocol import hash_of\n"
        f"print(hash_of(Path({str(tasks_dir)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == hash_of(tasks_dir)


def test_use_does_not_change_a_tokenizers_identity() -> None:
    tokenizer = tiny.tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "abc"], padding="longest", truncation=True, max_length=4)
    tokenizer.pad_token = "</s>"
    assert tokenizer_identity(tokenizer) == before
    tokenizer.add_tokens(["[x]"])
    assert tokenizer_identity(tokenizer) != before
