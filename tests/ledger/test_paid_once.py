"""What an item's result is found by: each thing that can change an answer, changed for real.

A result is put under the keys of a real family, its tasks and its engine; then one ingredient
changes on disk or in the config, everything is prepared anew, and the result must not be found.
What cannot change an answer must find it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import EngineInfo, ItemResult
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, skill_task, write_tasks
from agentmerge.ledger import Ledger, ResultKey
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe

TASK = skill_task("shift")


class Place:
    """A family and its tasks in a folder of their own, and a config that may be changed."""

    def __init__(self, folder: Path, family: TinyFamily) -> None:
        self.folder = folder
        shutil.copytree(family.base.parent, folder / "family", symlinks=False)
        moved = TinyFamily(
            folder / "family" / family.base.name,
            tuple(folder / "family" / expert.name for expert in family.experts),
            family.skills,
            family.seed,
        )
        self.tasks = write_tasks(folder / "tasks", family.skills, n_items=40)
        self.body: dict[str, Any] = demo_config(moved, self.tasks)
        self.body |= {"limit": 20, "task_search_path": [str(self.tasks)]}
        self.expert, self.base = moved.experts[0], moved.base

    def prepared(self) -> Prepared:
        return prepare(SearchConfig.from_text(yaml.safe_dump(self.body)))

    def keys(self) -> dict[str, ResultKey]:
        """Task -> the key of the uniform merge's results."""
        found = self.prepared()
        merge, _ = found.space.uniform()
        recipe_hash = Recipe.parse(merge.to_yaml()).hash(found.identities)
        engine = EngineInfo(**found.facts()["engine"])
        protocols = found.facts()["protocols"]
        return {task: ResultKey(recipe_hash, engine, protocols[task]) for task in protocols}

    def edit_task(self, old: str, new: str) -> None:
        path = self.tasks / f"{TASK}.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def change_a_weight(place: Place) -> None:
    """One element of one parent, the file's size unchanged."""
    path = place.expert / "model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def change_the_base(place: Place) -> None:
    path = place.base / "model.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[-1]].view(-1)[-1] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def give_a_template(place: Place) -> None:
    for model in (place.base, place.expert):
        template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
        (model / "chat_template.jinja").write_text(template)
    place.body["apply_chat_template"] = True


def change_the_tokenizer(place: Place) -> None:
    path = place.expert / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["bos_token"] = settings["eos_token"] = "\n"
    path.write_text(json.dumps(settings))


def few_shot(place: Place) -> None:
    place.edit_task("num_fewshot: 0", "num_fewshot: 1")
    place.body["num_fewshot"] = 1


CHANGES: dict[str, Callable[[Place], object]] = {
    "a parent's weights": change_a_weight,
    "the base's weights": change_the_base,
    "the task's question": lambda p: p.edit_task(
        "doc_to_text: prompt", "doc_to_text: '{{prompt}} '"
    ),
    "the decoding": lambda p: p.edit_task("max_gen_toks: 8", "max_gen_toks: 9"),
    "the chat template": give_a_template,
    "few-shot examples": few_shot,
    "the dtype": lambda p: p.body.update(worker={"dtype": "bfloat16"}),
    "the batch size": lambda p: p.body.update(worker={"batch_size": 7}),
    "the merge": lambda p: p.body["genome"].update(merge_method="linear", normalize=None),
}


@pytest.fixture
def place(tmp_path: Path, family: TinyFamily) -> Place:
    return Place(tmp_path, family)


def stored(place: Place, ledger: Ledger) -> None:
    refs = {task.name: task.part("search") for task in place.prepared().taskset.tasks}
    for task, key in place.keys().items():
        ledger.save_results(key, task, refs[task], [ItemResult(1.0)] * len(refs[task]))


@pytest.mark.parametrize("what", CHANGES)
def test_what_can_change_an_answer_never_hits(what: str, place: Place, tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        stored(place, ledger)
        assert ledger.results(place.keys()[TASK]), "the same question is found"
        CHANGES[what](place)
        assert ledger.results(place.keys()[TASK]) == {}


def test_a_changed_document_is_another_item(place: Place, tmp_path: Path) -> None:
    """Items are outside the protocol: of a task with one new document, the others are found."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        stored(place, ledger)
        path = next(path for path in place.tasks.rglob("*.json*") if path.stem == TASK)
        lines = path.read_text().splitlines()
        document = json.loads(lines[0])
        lines[0] = json.dumps(document | {"prompt": document["prompt"] + "?"})
        path.write_text("\n".join(lines) + "\n")
        found = ledger.results(place.keys()[TASK])
        asked = [ref.key for ref in place.prepared().taskset.task(TASK).part("search")]
        known = [key for key in asked if key in found]
        assert len(asked) == 20
        assert len(known) in (19, 20)
        everything = place.prepared().taskset.task(TASK).items
        assert len({ref.key for ref in everything}) == len(everything)


KEPT: dict[str, Callable[[Place], object]] = {
    "another limit": lambda p: p.body.update(limit=10),
    "another search": lambda p: p.body.update(search={"algorithm": "random", "seed": 9}),
    "another weight": lambda p: p.body["tasks"][0].update(weight=3.0),
    "a copied file": lambda p: (p.expert / "model.safetensors").touch(),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_cannot_change_an_answer_hits(what: str, place: Place, tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        stored(place, ledger)
        KEPT[what](place)
        found = ledger.results(place.keys()[TASK])
        asked = place.prepared().taskset.task(TASK).part("search")
        assert {ref.key for ref in asked} & set(found)


def test_a_moved_family_is_still_itself(place: Place, tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        stored(place, ledger)
        (place.folder / "family").rename(place.folder / "moved")
        text = yaml.safe_dump(place.body).replace("/family/", "/moved/")
        place.body = yaml.safe_load(text)
        assert len(ledger.results(place.keys()[TASK])) == 20
