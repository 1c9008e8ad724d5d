"""What model cards name, and where licences have to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.parents.cards import CardFacts, Licence, card_of, licence_notes, licences_of
from agentmerge.parents.sources import Parent


def licences(tmp_path: Path, **names: str) -> tuple[Licence, ...]:
    parents = []
    for model, name in names.items():
        (tmp_path / model).mkdir()
        if name:
            (tmp_path / model / "README.md").write_text(f"---\nlicense: {name}\n---\n")
        parents.append(Parent(str(tmp_path / model), tmp_path / model))
    return licences_of(parents)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"a": "mit", "b": "mit"}, []),
        ({"a": "mit", "b": "apache-2.0"}, ["the licences differ (mit, apache-2.0)"]),
        ({"a": "mit", "b": ""}, ["no card here names a licence of b"]),
        (
            {"a": "cc-by-nc-4.0", "b": "cc-by-nc-4.0"},
            ["cc-by-nc-4.0 of a: no", "b:"],
        ),
        ({"a": "gpl-3.0", "b": "mit"}, ["gpl-3.0 of a: what is made", "others are mit"]),
        ({"a": "cc-by-nd-4.0"}, ["no derivatives"]),
        ({"a": "llama3.1"}, ["terms of its own"]),
        ({"a": "other", "b": "unknown"}, ["no card here names a licence of a, b"]),
    ],
)
def test_what_is_said_of_licences(names: dict[str, str], said: list[str], tmp_path: Path) -> None:
    found = licence_notes(licences(tmp_path, **names))
    assert len(found) == len(said)
    assert all(part in note for part, note in zip(said, found, strict=True))


def test_model_and_adapter_have_each_their_own(tmp_path: Path) -> None:
    licences(tmp_path, model="llama3", adapter="mit")
    parent = Parent("model+adapter", tmp_path / "model", tmp_path / "adapter")
    assert [(one.model, one.name) for one in licences_of([parent])] == [
        ("model", "llama3"),
        ("adapter", "mit"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\nlicense: mit",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\nlicense: 7\n---\n",
        "---\n" + "a: &a [1]\n" + "b: [*a, *a]\n" + "license: !!python/object:os.system {}\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_of(tmp_path) == CardFacts()


def test_windows_lines_and_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(
        b"---\r\nlicense: other\r\nlicense_name: My-Terms\r\nlanguage: en\r\n---\r\n# x\r\n"
    )
    assert card_of(tmp_path) == CardFacts("my-terms", ("en",))
