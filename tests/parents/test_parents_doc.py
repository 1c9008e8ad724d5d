"""docs/parents.md quotes what is said: each sentence is one that the tests of it expect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "parents.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", TEXT.split("## What is refused")[1], re.M)


@pytest.mark.parametrize("sentence", ROWS)
def test_each_refusal_in_the_docs_is_one_that_occurs(sentence: str) -> None:
    files = [*HERE.glob("test_*.py"), *HERE.parents[1].glob("agentmerge/[mp]*/*.py")]
    said = "".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text()).replace("\\+", "+") for file in files
    )
    assert sentence in said


def test_there_are_sentences() -> None:
    assert len(ROWS) > 15
