"""Who names what is wrong with answers: ten faults injected, read by rules and by a model.

    python -m benchmarks.failures [--seeds 20]
    python -m benchmarks.failures --seeds 3 --base-url http://localhost:8000/v1 --model qwen3-8b
    python -m benchmarks.failures --seeds 3 --gguf model.gguf

A made task of sums, capitals and moods, 48 items a seed. Of its answers 70 % get one fault and the
others are plainly wrong: what a merge fails that has this fault. "an answer" is the share of the
faulty answers that the rules of `agentmerge.agents.reading` name, as the log counts them. "a
prompt" is the share of prompts of three such items, exactly as the critic sees them, whose fault is
named: by the rules, read back from the prompt's text, and by a model, which picks one of eleven
words. The last rows are controls: answers that are wrong and no more, and right ones. Where the
rules name something else, the last column says what. Writes JSON. Rules and faults are by the same
hand, and some faults were written so that the rules do not know them: what a share says is which
kinds are seen at all, not how often models do this.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge.agents.failing import item_of, section
from agentmerge.agents.models import AgentModel
from agentmerge.agents.providers import resolve_model
from agentmerge.agents.reading import FAULTS, FailingItem, fault_of
from agentmerge.errors import ModelReplyError
from benchmarks.agents import served

ITEMS, SHARE, SHOWN = 48, 0.7, 3
NAMES = ("Tom", "Ann", "Mia", "Ali", "Eva", "Ben")
THINGS = ("apples", "books", "coins", "pens", "eggs")
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Peru": "Lima",
    "Cuba": "Havana", "Kenya": "Nairobi", "Spain": "Madrid", "Norway": "Oslo", "Chile": "Santiago",
    "Greece": "Athens", "Ghana": "Accra", "Nepal": "Kathmandu", "Canada": "Ottawa",
    "Argentina": "Buenos Aires", "India": "New Delhi",
}  # fmt: skip
MOODS = {
    "The room was clean and the staff were kind": "positive",
    "I waited an hour for cold soup": "negative",
    "It broke on the second day": "negative",
    "We laughed the whole evening": "positive",
    "Worth every cent that I paid for it": "positive",
    "Nobody answered my letters": "negative",
}
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
ONES = "zero one two three four five six seven eight nine"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


@dataclass(frozen=True, slots=True)
class Item:
    asks: str
    right: str

    @property
    def number(self) -> int | None:
        return int(self.right) if self.right.isdigit() else None


Draw = np.random.Generator
#: An item, the one before it, and chance -> an answer and whether it was cut off.
Fault = Callable[[Item, Item, Draw], tuple[str, bool]]
INJECTED: dict[str, Fault] = {}


def fault(make: Fault) -> Fault:
    INJECTED[make.__name__.removeprefix("make_")] = make
    return make


def pick(draw: Draw, options: Sequence[str]) -> str:
    return options[int(draw.integers(len(options)))]


def in_words(number: int) -> str:
    if number < 20:
        return f"{ONES} {TEENS}".split()[number]
    tens, ones = divmod(number % 100, 10)
    said = TENS.split()[tens - 2] if tens > 1 else in_words(number % 100)
    said += f"-{ONES.split()[ones]}" if tens > 1 and ones else ""
    return f"one hundred and {said}" if number >= 100 else said


def made_items(draw: Draw) -> list[Item]:
    found = []
    for number in range(ITEMS):
        if number % 3 == 0:
            a, b = (int(n) for n in draw.integers(3, 60, 2))
            who, what = pick(draw, NAMES), pick(draw, THINGS)
            asks = f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have?"
            found.append(Item(f"Question: {asks}\nAnswer:", str(a + b)))
        elif number % 3 == 1:
            land = pick(draw, list(CAPITALS))
            found.append(Item(f"Question: What is the capital of {land}?\nAnswer:", CAPITALS[land]))
        else:
            text = pick(draw, list(MOODS))
            asks = f"Review: {text}.\nIs the review positive or negative?\nAnswer:"
            found.append(Item(asks, MOODS[text]))
    return found


@fault
def make_format(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    n, right = item.number, item.right
    if n is None:
        forms = [right.upper(), f'"{right}"', f"['{right}']", f"**{right}**", f"{right}."]
    else:
        forms = [f"{n}.00", f"${n}", in_words(n), f'{{"answer": {n}}}', f"\\boxed{{{n}}}", f"0{n}"]
    return pick(draw, forms), False


@fault
def make_language(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    right = item.right
    return pick(draw, [
        f"정답은 {right} 입니다. 왜냐하면 문제에서 그렇게 말했기 때문입니다.",
        "그것은 질문에 따라 다르지만 저는 그렇게 생각합니다.",
        f"Die Antwort ist {right}, denn das steht so in der Frage und ist nicht schwer.",
        f"La réponse est {right}, parce que la question le dit et que les faits sont clairs.",
        f"La respuesta es {right} por lo que dice el texto y los datos que se dan.",
        "答案取决于这个问题的内容。",
    ]), False  # fmt: skip


@fault
def make_cut_off(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    text = pick(draw, [
        "Let us think step by step. First we look at what the question asks, then we go through "
        "what is given, one by one, and in the end we put everything together to find the answer",
        "To find this out, I will begin with what is known. It is said in the text above that "
        "there is something to be found, so the first step is to see which part of it matters here",
        f"The question is about this: {item.asks} To solve it we need to look at every word",
    ])  # fmt: skip
    return text[: int(draw.integers(40, len(text)))], True


@fault
def make_refusal(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    return pick(draw, [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I do not have access to this.",
        "I cannot answer this question.",
        "Sorry, I am unable to assist with this request.",
        "I must decline to answer.",
        "That is not something that I may talk about.",
        "Please ask a professional about this instead.",
        "죄송하지만 도와드릴 수 없습니다.",
    ]), False  # fmt: skip


@fault
def make_template(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    right = item.right
    return pick(draw, [
        f"<|im_start|>assistant\n{right}<|im_end|>",
        f"{right}</s>",
        f"[/INST] {right}",
        f"### Response:\n{right}",
        f"{right}\nUser: thank you\nAssistant: you are welcome",
        f"assistant\n\n{right}",
        f"{right}<|eot_id|>",
        f"{right}\n\nQuestion: What is next?\nAnswer:",
    ]), False  # fmt: skip


@fault
def make_repeats(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    times = int(draw.integers(3, 12))
    return pick(draw, [
        "the answer is the answer " * times,
        "We have to look at the question once more. " * times,
        " ".join(f"{n}. We read the question again." for n in range(1, times + 1)),
        f"It is {item.right} or so. " + "and so on, " * times,
        "질문을 다시 읽어 봅시다. " * times,
    ]), bool(draw.integers(2))  # fmt: skip


@fault
def make_empty(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    return pick(draw, ["", " ", "\n\n", ".", " - ", "…"]), False


@fault
def make_other_item(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    return before.right, False


@fault
def make_extra(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    right = item.right
    return pick(draw, [
        f"The answer is {right}.",
        f"{right}, because that is what the text says.",
        f"Sure! I would say that it is {right}.",
        f"{right}\n\nLet me know if you have more of these.",
        f"First I read it twice. Then I thought about it. So it is {right}, I think.",
    ]), False  # fmt: skip


@fault
def make_wrong(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    n = item.number
    if n is not None:
        return str(n + int(pick(draw, ["-10", "-2", "-1", "1", "2", "10"]))), False
    same = CAPITALS if item.right in CAPITALS.values() else MOODS
    return pick(draw, sorted({*same.values()} - {item.right})), False


@fault
def make_none(item: Item, before: Item, draw: Draw) -> tuple[str, bool]:
    return item.right, False


@dataclass(frozen=True, slots=True)
class Failed:
    """What a merge with one fault fails: the items, whether each has it, and all right answers."""

    items: list[FailingItem]
    faulty: list[bool]
    rights: dict[tuple[str, int], str]


def failed(name: str, seed: int) -> Failed:
    draw = np.random.default_rng([seed, list(INJECTED).index(name)])
    made = made_items(draw)
    items, faulty = [], []
    for number, item in enumerate(made):
        has = name in ("wrong", "none") or draw.random() < SHARE
        before = made[number - 1]
        if name == "other_item" and before.right == item.right:
            has = False
        said, cut = INJECTED[name if has else "wrong"](item, before, draw)
        text = (item.asks, item.right)
        items.append(item_of("made", number, text, [said], cut_off=cut))
        faulty.append(has)
    rights = {("made", number): item.right for number, item in enumerate(made)}
    return Failed(items, faulty, rights)


_ITEM = re.compile(r"^Item (\d+) of (\S+):$", re.MULTILINE)


def read_back(prompt: str) -> list[FailingItem]:
    """The items of a prompt, from its text alone."""
    mark = re.findall(r"<item (\w{12})>", prompt)[0]
    pieces = _ITEM.split(prompt)[1:]
    found = []
    for index, task, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        said = dict(re.findall(rf"<(\w+) {mark}>\n(?:(.*?)\n)?</\1 {mark}>", body, re.DOTALL))
        outside = re.sub(rf"<(\w+) {mark}>.*?</\1 {mark}>", "", body, flags=re.DOTALL)
        found.append(
            FailingItem(task, int(index), said["item"], said["right"], said["answer"],
                        cut_off="cut off" in outside)
        )  # fmt: skip
    return found


def by_rules(prompt: str) -> str:
    """The fault that most of a prompt's items have; of none but wrong ones, that."""
    items = read_back(prompt)
    rights = {(item.task, item.index): item.right for item in items}
    found = Counter(fault_of(item, rights) for item in items)
    named = [pair for pair in found.most_common() if pair[0] != "wrong"]
    return named[0][0] if named else "wrong"


ASKED = """You read answers of a language model that were marked as failures. Name the one fault \
that most of them share:
- empty: nothing was said
- template: special tokens, or turns of a chat, in the answer
- repeats: it repeats itself
- refusal: it refuses or declines
- format: right, written in another form (number, quotes, case)
- extra: right, with words around it
- cut_off: it ends in the middle, at its length limit
- language: in another language than the question
- other_item: it answers another question than the one that was asked
- wrong: a clean answer that is just not right
- none: the answers are exactly right
Answer with one JSON object: {"fault": "one of these words"}"""


def by_model(model: AgentModel, prompt: str) -> str:
    schema = {
        "title": "Fault",
        "type": "object",
        "properties": {"fault": {"type": "string", "enum": list(FAULTS)}},
        "required": ["fault"],
        "additionalProperties": False,
    }

    def parse(text: str) -> str:
        try:
            said = json.loads(text)["fault"]
        except (ValueError, KeyError, TypeError):
            raise ModelReplyError('answer with {"fault": "..."}') from None
        if said not in FAULTS:
            raise ModelReplyError(f"fault must be one of {', '.join(FAULTS)}")
        return str(said)

    messages = [{"role": "system", "content": ASKED}, {"role": "user", "content": prompt.strip()}]
    try:
        return model.ask(messages, schema, parse).parsed
    except ModelReplyError as error:
        print(f"no reply: {error}", file=sys.stderr)
        return "(no valid reply)"


def one(name: str, seed: int, model: AgentModel | None) -> dict[str, Any]:
    found = failed(name, seed)
    draw = np.random.default_rng([seed, 1_000, list(INJECTED).index(name)])
    named = [fault_of(i, found.rights) for i, has in zip(found.items, found.faulty, strict=True)
             if has]  # fmt: skip
    shown = sorted(draw.permutation(len(found.items))[:SHOWN])
    prompt = section([found.items[i] for i in shown])
    return {
        "fault": name,
        "seed": seed,
        "answers": dict(Counter(named)),
        "rules": by_rules(prompt),
        "model": None if model is None else by_model(model, prompt),
        "chars": len(ASKED) + len(prompt),
    }


def table(rows: Sequence[dict[str, Any]], modelled: bool) -> str:
    lines = [
        "| fault | an answer, by rules | a prompt, by rules |"
        f"{' a prompt, by the model |' * modelled} rules say instead |",
        "|---|---|---|" + "---|" * (1 + modelled),
    ]
    for name in INJECTED:
        own = [row for row in rows if row["fault"] == name]
        said = sum((Counter(row["answers"]) for row in own), Counter[str]())
        right, every = said.pop(name, 0), sum(sum(row["answers"].values()) for row in own)
        instead = ", ".join(f"{other} {count / every:.0%}" for other, count in said.most_common(3))
        shares = [right / every, *(sum(r[who] == name for r in own) / len(own)
                                   for who in ("rules", "model")[: 1 + modelled])]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(f'{s:.0%}' for s in shares)} | {instead or '-'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failures", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--base-url", help="a server that speaks the OpenAI protocol")
    parser.add_argument("--gguf", type=Path, help="a model file to serve instead")
    parser.add_argument("--model", default="local")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/failures.json"))
    asked = parser.parse_args()
    server = served(asked.gguf) if asked.gguf else nullcontext(asked.base_url)
    rows: list[dict[str, Any]] = []
    with server as url:
        model = None
        if url:
            chat = resolve_model(
                asked.model, base_url=url, temperature=0.0, timeout_s=asked.timeout,
                max_tokens=60, api_key_env="none",
            )  # fmt: skip
            model = AgentModel(chat, timeout_s=asked.timeout, max_retries=1, max_tokens=60)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(asked.seeds):
            for name in INJECTED:
                rows.append(one(name, seed, model))
                asked.out.write_text(json.dumps(rows, indent=1))
                if model is not None:
                    print(f"seed {seed} {name}: {rows[-1]['model']}", file=sys.stderr, flush=True)
    print(table(rows, model is not None))
    longest = max(row["chars"] for row in rows)
    print(f"\n{len(rows)} prompts, the longest of {longest} characters")


if __name__ == "__main__":
    main()
