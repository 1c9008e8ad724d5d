"""Chat templates and tokenizers tried out in a process of their own, with little time and memory.

A template is a program that came with a model, and a tokenizer is full of patterns: either can take
hours or all memory over one short chat. Whoever goes on uses them in its own process, so they are
tried here first. What is merely wrong with them (they cannot be read, or refuse the chat) is left
to those who use them to say. Knows files and no models; ``python -m`` runs the trial itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

#: Seconds of computing that each may take, and address space of the process that tries them.
CPU_S, MEMORY_GB = 10, 4
#: Seconds by the clock for each, on a machine that is busy or waits for a disk.
_WALL_S = 180
_CHAT = [
    {"role": "user", "content": "Is 12 more than 7?\n\nSay yes or no."},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Häuser 家 🙂   and 'quotes' <|im_end|>"},
]
#: Tokens a character of text, of a tokenizer that reads bytes one by one and marks each.
_MOST_TOKENS = 20
_TEXT = " ".join(m["content"] for m in _CHAT) + " " * 300 + "a" * 300 + "1" * 300 + "\n" * 300


@dataclass(frozen=True, slots=True)
class Trial:
    """text: of a template. file: of a tokenizer, or the folder that it is put together from. whose:
    in words, for who reads the fault."""

    kind: Literal["chat template", "tokenizer"]
    whose: str
    text: str = ""
    file: str = ""


def trials_of(templates: Mapping[str, str | None], folders: Mapping[str, Path]) -> list[Trial]:
    """What is worth a trial, the same under several names once: templates and tokenizers by whose
    they are."""
    found: dict[tuple[str, str], Trial] = {}
    for whose, text in templates.items():
        if text:
            found.setdefault(("", text), Trial("chat template", whose, text=text))
    for whose, folder in folders.items():
        file = folder / "tokenizer.json"
        if not file.is_file():
            file = folder
        with contextlib.suppress(OSError):  # where nothing is: said by who reads it
            same = f"{file.stat().st_size} {os.path.realpath(file)}"
            found.setdefault(("file", same), Trial("tokenizer", whose, file=str(file)))
    return list(found.values())


def faults_of(trials: Sequence[Trial]) -> list[str]:
    """A sentence for the first of them that takes too much; empty where none does."""
    if not trials:
        return []
    here = str(Path(__file__).parents[2])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    single = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "agentmerge.evaluation.trials"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | single | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    late = False
    body = {"cpu_s": CPU_S, "trials": [asdict(trial) for trial in trials]}
    asked = json.dumps(body).encode()
    try:
        said, _ = child.communicate(asked, timeout=_WALL_S * len(trials))
    except subprocess.TimeoutExpired:
        late = True
        child.kill()
        said, _ = child.communicate()
    except BaseException:
        child.kill()
        raise
    begun = said.decode().split()
    if not late and begun[-1:] == ["done"]:
        return []
    trial = trials[max(0, sum(word == "begin" for word in begun) - 1)]
    took = f"is not done with one short chat after {CPU_S} s"
    if begun[-1:] == ["memory"] or child.returncode == -signal.SIGABRT:
        took = f"takes more than {MEMORY_GB} GB for one short chat"
    elif begun[-1:] == ["tokens"]:
        took = f"makes more than {_MOST_TOKENS} tokens of each character of one short chat"
    elif not late and child.returncode != -signal.SIGXCPU:
        took = f"ends the process that uses it on one short chat (exit code {child.returncode})"
    remedy = "set genome.chat_template to another, or apply_chat_template: false"
    if trial.kind == "tokenizer":
        remedy = f"replace {trial.file}, or leave the model out"
    return [f"the {trial.kind} of {trial.whose} {took}; {remedy}"]


def main() -> None:
    """Try what stdin asks for; says ``begin`` before each, and ``done``."""
    asked = json.load(sys.stdin)
    trials = [Trial(**entry) for entry in asked["trials"]]
    with contextlib.suppress(ImportError, ValueError, OSError):  # where a system has no such limit
        import resource

        most = MEMORY_GB << 30
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for trial in trials:
        if os.path.isdir(trial.file):
            import transformers.models.auto.tokenization_auto  # noqa: F401  (not the tokenizer's time)
        _allow(asked["cpu_s"])
        print("begin", flush=True)
        try:
            _render(trial.text) if trial.kind == "chat template" else _encode(trial.file)
        except MemoryError:
            print("memory", flush=True)
            return
        except _TooManyTokens:
            print("tokens", flush=True)
            return
        except Exception:  # whoever uses it says what is wrong with it
            continue
    print("done", flush=True)


class _TooManyTokens(Exception):
    """Of a short text: the items' own would fill the memory."""


def _allow(cpu_s: int) -> None:
    """So much computing from now on."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu_s, most))


def _render(template: str) -> None:
    """As transformers does: the same environment of jinja."""
    from datetime import datetime

    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Its marks around an answer change nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    told = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    compiled = environment.from_string(template)
    for chat in (_CHAT, _CHAT[:1], [{"role": "system", "content": "Be brief."}, *_CHAT]):
        with contextlib.suppress(jinja2.TemplateError):  # no place for a system's words
            compiled.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=True, **told
            )


def _encode(file: str) -> None:
    if os.path.isdir(file):  # the same conversion, from whatever files are there
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(file)
        ids = tokenizer(_TEXT)["input_ids"]
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(file)
        ids = tokenizer.encode(_TEXT).ids
    if len(ids) > _MOST_TOKENS * len(_TEXT):
        raise _TooManyTokens
    tokenizer.decode(ids)


if __name__ == "__main__":
    main()
