"""Breaks model folders and configs: what a download, an editor or an attacker may leave there.

Each draw is one change to a copy of a family of two experts and its config. ``check`` looks at it
in a process of its own, and where it finds no fault, ``run`` searches; where that fails after the
search has begun, the files are put back and ``resume`` has to end it.

The program is imported once and forked for each draw, within ``SECONDS`` and ``MEGABYTES``.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.outside.tally import BAD, Tally

#: What a draw's process may take, of processor time and of memory beside what is imported.
SECONDS = 40
MEGABYTES = 1500
_NAMES = ("base", "b", "c")
_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz:= \n"]
#: Values that stand nowhere, by kind of what may follow from them.
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 10**9, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "../../x", "/dev/zero", "a\0b", "x" * 300_000, "\ud800",
    "{{ 1/0 }}", "{% for", [], {}, [None], [[]], {"": None}, [1, "a", None], "1e9", "NaN",
)  # fmt: skip
_DTYPES = ("F99", "I64", "F16", 7, None, [], "F8_E4M3")
_ODD_NAMES = ("", "\0", "../../x", "\ud800", "." * 9)
_EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
_SIZES = {"A": (2, 32), "B": (32, 2)}  # of an adapter's two matrices


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit code, or minus the signal that ended it."""

    code: int
    said: str
    seconds: float
    megabytes: float


def main(draws: int, seed: int, *, search: bool = True) -> Tally:
    """Counts of ``draws`` draws. search: False only checks, which is a fifth of the time."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="agentmerge-outside-") as scratch:
        family = write_family(Path(scratch))
        _import_all()
        begun = time.monotonic()
        for draw in range(draws):
            kind, ending, note = one_draw(family, seed, draw, search=search)
            tally.add(kind, ending, f"--seed {seed}, draw {draw}: {note}")
            if ending in BAD:
                print(tally.notes[-1], file=sys.stderr)
            if sys.stderr.isatty():
                print(f"\r{draw + 1} of {draws}", end="", file=sys.stderr)
    tally.notes.append(f"{draws} draws in {time.monotonic() - begun:.0f} s")
    return tally


def one_draw(family: Path, seed: int, draw: int, *, search: bool = True) -> tuple[str, str, str]:
    """(what was broken, how it ended, what was seen)."""
    rng = random.Random(f"{seed}/{draw}")
    place = family.with_name(f"draw-{draw}")
    shutil.copytree(family, place)
    kinds = [*_KINDS]
    kind = kinds[draw % len(kinds)]
    try:
        change = _KINDS[kind](rng, place)
        ending, note = _ending(family, place, search)
        return kind, ending, f"{change}: {note}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _ending(family: Path, place: Path, search: bool) -> tuple[str, str]:
    looked = _command(place, "check", "c.yml")
    if bad := _bad(looked):
        return bad, f"check: {looked}"
    if looked.code == 2:
        return "refused by check", looked.said
    if not search:
        return "passed check", ""
    ran = _command(place, "run", "c.yml", "--name", "one", "--quiet", "--json")
    if bad := _bad(ran):
        return bad, f"run: {ran}"
    if ran.code == 0:
        return "searched", ""
    for name in ("models", "tasks"):
        shutil.rmtree(place / name)
        shutil.copytree(family / name, place / name)
    begun = (place / "runs" / "one").exists()
    if not begun:
        return "refused by run", ran.said
    mended = _command(place, "resume", "one", "--quiet", "--json")
    if _bad(mended) or mended.code:
        return "not mended", f"run: {ran}; resume: {mended}"
    return "failed and resumed", ran.said


def _bad(ended: Ended) -> str:
    if ended.seconds > SECONDS or ended.megabytes > MEGABYTES:
        return "over bounds"
    lines = [line for line in ended.said.splitlines() if line.strip()]
    foreseen = ended.code == 0 or any(line.startswith("error: ") for line in lines)
    if "Traceback" in ended.said or "error: unexpected" in ended.said or not foreseen:
        return "unexpected"
    return "" if ended.code in (0, 1, 2) else "unexpected"


def _command(place: Path, *arguments: str) -> Ended:
    """A command of the program in a fork of this process."""
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_the_program(place, arguments, said.fileno())
        usage = _waited(child)
        said.seek(0)
        text = said.read().decode(errors="replace")
    status, used = usage
    took = max(used.ru_utime + used.ru_stime, (time.monotonic() - begun) / 10)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, text[-3000:], round(took, 1), round(used.ru_maxrss / 1024))


def _waited(child: int) -> tuple[int, Any]:
    """A process's end, by force where it does not come (a pipe that nobody writes to)."""
    until = time.monotonic() + 10 * SECONDS
    while time.monotonic() < until:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return status, used
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return status, used


def _be_the_program(place: Path, arguments: tuple[str, ...], said: int) -> None:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 20, SECONDS + 30))
        size = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = (_address_space() + (8 << 30), size)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(place)
        from agentmerge.cli.app import run_app

        code = run_app(list(arguments))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _import_all() -> None:
    """What the program imports in a search, so that forks need not."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import agentmerge.cli.app
    import agentmerge.session.driving
    import agentmerge.workers.hf  # noqa: F401

    torch.set_num_threads(1)


# What is broken, and how


def _file(*names: str) -> Callable[[random.Random, Path], str]:
    """A model's file is not what it was: replaced, cut off, or of another kind."""

    def change(rng: random.Random, place: Path) -> str:
        path = _model(rng, place) / rng.choice(names)
        return f"{path.name}: {_spoil(rng, path)}"

    return change


def _spoil(rng: random.Random, path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    ways: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a link to nowhere": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "unreadable": lambda: path.write_bytes(b"\xff\xfe\x00garbage" * 9),
        "empty": lambda: path.write_bytes(b""),
        "cut off": lambda: path.write_bytes(content[: rng.randrange(len(content))]),
        "nested": lambda: path.write_bytes(b'{"a": ' * 50_000),
        "lists": lambda: path.write_bytes(b"[" * 100_000 + b"]" * 100_000),
        "a list": lambda: path.write_bytes(b"[1, 2]"),
        "null": lambda: path.write_bytes(b"null"),
        "a huge number": lambda: path.write_bytes(b'{"a": ' + b"9" * 100_000 + b"}"),
        "a terabyte": lambda: _sparse(path, 1 << 40),
        "noise": lambda: path.write_bytes(_noise(rng, content)),
    }
    way = rng.choice(list(ways))
    ways[way]()
    return way


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


def _noise(rng: random.Random, content: bytes) -> bytes:
    body = bytearray(content or b"{}")
    for _ in range(rng.choice((1, 3, 30))):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def _json(*names: str) -> Callable[[random.Random, Path], str]:
    """One value of a model's JSON is another."""

    def change(rng: random.Random, place: Path) -> str:
        models = [path for path in (place / "models").iterdir() if (path / names[0]).exists()]
        everywhere = rng.random() < 0.5
        name = rng.choice([n for n in names if (models[0] / n).exists()])
        state = rng.getstate()
        for path in models if everywhere else [_model(rng, place)]:
            rng.setstate(state)
            body = json.loads((path / name).read_text())
            said = _twist(rng, body, ("hidden_size", "num_hidden_layers", "vocab_size", "vocab"))
            text = json.dumps(body, default=str)
            (path / name).write_text(text)
        return f"{name}{' of all' if everywhere else ''}: {said}"

    return change


def _twist(rng: random.Random, body: Any, favourites: tuple[str, ...] = ()) -> str:
    """One value somewhere in a JSON value replaced, removed or added."""
    path: list[Any] = []
    node = body
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        liked = [key for key in keys if key in favourites]
        key = rng.choice(liked if liked and rng.random() < 0.3 else keys)
        path.append(key)
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.4:
            break
        node = node[key]
    key, odd = path[-1], copy.deepcopy(rng.choice(_ODD))
    if isinstance(node, dict) and rng.random() < 0.15:
        del node[key]
        return f"without {path}"
    node[key] = odd
    return f"{path} = {repr(odd)[:40]}"


def _header(rng: random.Random, place: Path) -> str:
    """A safetensors header says what is not so."""
    path = _model(rng, place) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    body, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([key for key in body if key != "__metadata__"])
    entry = body[name]
    start, end = entry["data_offsets"]
    ways: dict[str, Callable[[], object]] = {
        "overlapping": lambda: entry.update(data_offsets=[max(0, start - 64), end - 64]),
        "a gap": lambda: body.pop(name),
        "negative": lambda: entry.update(data_offsets=[-8, end - start - 8]),
        "floats": lambda: entry.update(data_offsets=[float(start), float(end)]),
        "backwards": lambda: entry.update(data_offsets=[end, start]),
        "far": lambda: entry.update(data_offsets=[start, 1 << 60]),
        "dtype": lambda: entry.update(dtype=rng.choice(_DTYPES)),
        "shape": lambda: entry.update(
            shape=rng.choice([[], [-1], [1.5], [1 << 62, 4], "x", None, [[1]], [0], [True]])
        ),
        "twisted": lambda: _twist(rng, body),
        "many": lambda: body.update(
            {f"t{i}": _EMPTY for i in range(400_000)}
        ),
        "layers": lambda: body.update(
            {"model.layers.999999999.x.weight": _EMPTY}
        ),
        "name": lambda: body.update({rng.choice(_ODD_NAMES): body.pop(name)}),
        "metadata": lambda: body.update({"__metadata__": rng.choice(_ODD)}),
    }  # fmt: skip
    way = rng.choice([*ways, "length", "ten gigabytes", "twice", "deep"])
    if way in ways:
        ways[way]()
    text = json.dumps(body).encode()
    if way == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    if way == "deep":
        text = b'{"a": ' * 30_000 + b"1" + b"}" * 30_000
    sizes = {"length": len(text) + len(rest) + 1, "ten gigabytes": 10 << 30}
    path.write_bytes(sizes.get(way, len(text)).to_bytes(8, "little") + text + rest)
    return f"header: {way}"


def _index(rng: random.Random, place: Path) -> str:
    """A sharded model's index leads elsewhere."""
    model = _model(rng, place)
    path = model / "model.safetensors.index.json"
    weights = model / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    names = [n for n in json.loads(weights.read_bytes()[8 : 8 + length]) if n != "__metadata__"]
    shard = "model-00001-of-00001.safetensors"
    weights.rename(model / shard)
    body: Any = {
        "metadata": {},
        "weight_map": dict.fromkeys(names, shard),
    }
    way = rng.choice(["out", "absolute", "link", "twisted", "spoilt", "stranger", "missing"])
    if way == "out":
        shutil.copy(model / shard, place / "x.safetensors")
        body["weight_map"] = dict.fromkeys(names, "../../x.safetensors")
    elif way == "absolute":
        body["weight_map"][names[0]] = "/etc/passwd"
    elif way == "link":
        (model / shard).unlink()
        (model / shard).symlink_to("/etc/passwd")
    elif way == "twisted":
        _twist(rng, body)
    elif way == "stranger":
        body["weight_map"]["stranger"] = shard
    elif way == "missing":
        body["weight_map"][names[0]] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(body))
    return f"index: {_spoil(rng, path) if way == 'spoilt' else way}"


def _adapter(rng: random.Random, place: Path) -> str:
    """An adapter's config or weights, on one of the models."""
    import torch
    from safetensors.torch import save_file

    adapter = place / "models" / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_{side}.weight": torch.ones(size) for side, size in _SIZES.items()},
        adapter / "adapter_model.safetensors",
    )  # fmt: skip
    body: Any = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "use_rslora": False, "bias": "none",
    }  # fmt: skip
    said = _twist(rng, body)
    (adapter / "adapter_config.json").write_text(json.dumps(body))
    if rng.random() < 0.3:
        file = rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        said = f"{file} {_spoil(rng, adapter / file)}"
    config = yaml.safe_load((place / "c.yml").read_text())
    config["genome"]["models"][1] += "+models/adapter"
    (place / "c.yml").write_text(yaml.safe_dump(config))
    return f"adapter: {said}"


def _template(rng: random.Random, place: Path) -> str:
    """A chat template of another type, or one that cannot be used."""
    value = rng.choice([*_ODD, [{"name": "default"}], [{"template": 7}], "{{ messages[99] }}"])
    for name in _NAMES:
        path = place / "models" / name / "tokenizer_config.json"
        body = json.loads(path.read_text()) | {"chat_template": value}
        path.write_text(json.dumps(body))
    config = yaml.safe_load((place / "c.yml").read_text()) | {"apply_chat_template": True}
    (place / "c.yml").write_text(yaml.safe_dump(config))
    return f"chat_template = {repr(value)[:40]}"


def _config_value(rng: random.Random, place: Path) -> str:
    body = yaml.safe_load((place / "c.yml").read_text())
    said = _twist(rng, body)
    try:
        (place / "c.yml").write_text(yaml.safe_dump(body))
    except UnicodeEncodeError:
        (place / "c.yml").write_text(json.dumps(body))
    return f"config: {said}"


def _config_text(rng: random.Random, place: Path) -> str:
    path = place / "c.yml"
    text = path.read_text()
    levels = (f"m{i}: &m{i} [{'*m' + str(i - 1) + ', '}*m{i - 1}]" for i in range(1, 40))
    ways: dict[str, str] = {
        "alias bomb": "\n".join(["m0: &m0 [x]", *levels]) + "\n" + text,
        "nested": text + "x: " + "[" * 3000 + "]" * 3000,
        "circle": text + "x: &x [*x]\n",
        "digits": text.replace("seed: 1", f"seed: {'9' * 10_000}"),
        "object": text + "x: !!python/object/apply:os.getcwd []\n",
        "huge": text + "# " + "x" * (2 << 20),
    }
    way = rng.choice([*ways, "spoilt"])
    if way == "spoilt":
        return f"config: {_spoil(rng, path)}"
    path.write_text(ways[way])
    return f"config: {way}"


def _task(rng: random.Random, place: Path) -> str:
    path = place / "tasks" / "ppl.yaml"
    if rng.random() < 0.3:
        return f"task: {_spoil(rng, path)}"
    body = yaml.safe_load(path.read_text())
    said = _twist(rng, body)
    path.write_text(json.dumps(body))
    return f"task: {said}"


def _model(rng: random.Random, place: Path) -> Path:
    return place / "models" / rng.choice(_NAMES)


_KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "model's files": _file(
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "model.safetensors.index.json", "chat_template.jinja",
    ),
    "model's config": _json("config.json"),
    "safetensors header": _header,
    "tokenizer": _json("tokenizer.json", "tokenizer_config.json"),
    "generation config": _json("generation_config.json"),
    "index": _index,
    "adapter": _adapter,
    "chat template": _template,
    "config's values": _config_value,
    "config's text": _config_text,
    "task": _task,
}  # fmt: skip


# The family that is broken


def write_family(root: Path) -> Path:
    """A base and two experts, two tasks and a config, in ``root/whole``."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = root / "whole"
    number = {token: i for i, token in enumerate(_TOKENS)}
    backend = Tokenizer(models.WordLevel(number, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(_TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for seed, name in enumerate(_NAMES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.save_pretrained(place / "models" / name)
        tokenizer.save_pretrained(place / "models" / name, save_jinja_files=False)
    (place / "tasks").mkdir()
    docs = [{"q": f"s:{'ab' * n}=", "a": "ba"} for n in range(1, 9)]
    (root / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, metric in (("acc", "acc"), ("ppl", "perplexity")):
        task = {
            "task": f"outside_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(root / "docs.jsonl")}},
            "output_type": "loglikelihood", "doc_to_text": "q", "doc_to_target": "a",
            "metric_list": [{"metric": metric}],
        }  # fmt: skip
        (place / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (place / "c.yml").write_text(
        "genome:\n  models: [models/b, models/c]\n  base_model: models/base\n"
        "  merge_method: task_arithmetic\n  layer_granularity: 1\n"
        "tasks:\n- {name: outside_acc, metric: 'acc,none'}\n"
        "- {name: outside_ppl, metric: 'perplexity,none', weight: -0.01}\n"
        "task_search_path: [tasks]\napply_chat_template: false\nlimit: 6\n"
        "search: {algorithm: random, seed: 1, population: 2, sealed_share: 0}\n"
        "agents: {llm: none}\n"
        "worker: {kind: hf, batch_size: 4, options: {threads: 1}}\n"
        "budget: {max_evaluations: 5}\n"
    )
    return place
