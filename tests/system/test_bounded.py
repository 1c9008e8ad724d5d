"""What is read from files that others wrote is bounded where it enters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmerge.agents.prompts import load_prompts
from agentmerge.agents.providers import read_keys
from agentmerge.config import SearchConfig
from agentmerge.errors import ConfigError, ParentError, RecipeError, UserError
from agentmerge.parents.headers import read_json
from agentmerge.recipe import Recipe
from agentmerge.session.context import ClientContext
from agentmerge.system.bounded import MOST_TEXT, parse_json, read_text
from agentmerge.system.yaml_text import read_yaml

GENOME = "genome: {models: [a, b], merge_method: linear}\ntasks: [{name: x}]\n"


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80")


ODD = [_pipe, _folder, _device, _huge, _binary]
READERS: dict[str, Callable[[Path], object]] = {
    "config": SearchConfig.from_file,
    "recipe": lambda path: Recipe.parse(path),
    "keys": read_keys,
    "json": read_json,
}


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], reader: str
) -> None:
    path = tmp_path / "odd"
    make(path)
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        READERS[reader](path)
    assert time.monotonic() - began < 5
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_prompt_that_is_no_file_is_refused(tmp_path: Path) -> None:
    _pipe(tmp_path / "critic.md")
    with pytest.raises(UserError, match="pipe"):
        load_prompts(str(tmp_path))


BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))]
)
MERGED = "\n".join(
    [
        "m0: &m0 {a: 1}",
        *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 25)),
    ]
)
ABSURD = {
    "an alias bomb": (BOMB, "stands for more than"),
    "a bomb of merged keys": (MERGED, "stands for more than"),
    "an alias that contains itself": ("genome: &g [*g]", "contains itself"),
    "nested brackets": ("genome: " + "[" * 5000 + "]" * 5000, "nest"),
    "nested levels": ("".join(" " * i + "a:\n" for i in range(600)), "nest"),
    "a huge text": ("genome: '" + "x" * (MOST_TEXT - 100) + "'", "characters"),
    "more than a text": ("# " + "x" * MOST_TEXT, "bytes"),
    "a whole number without end": (f"limit: {'9' * 100_000}\n{GENOME}", "not"),
    "a whole number beyond 64 bits": (f"limit: {2**80}\n{GENOME}", "more than 64 bits"),
    "a number in base 60": (f"limit: {'59:' * 50_000}1\n{GENOME}", "more than 64 bits"),
    "a day that is none": (f"limit: 2026-13-45\n{GENOME}", "not what its form says"),
    "a tag that its value is not": (f"limit: !!int abc\n{GENOME}", "not what its form says"),
    "a switch that is none": (f"limit: !!bool x\n{GENOME}", "not what its form says"),
    "an object": (f"limit: !!python/object/apply:os.system [x]\n{GENOME}", "not YAML"),
    "a NUL": (GENOME.replace("a,", '"a\\0",'), "NUL"),
    "a key that is a list": (f"? [a]\n: 1\n{GENOME}", "not YAML"),
    "many values": ("x: [" + "1," * 200_000 + "]", "stands for more than"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_yaml_is_refused_wherever_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = ABSURD[name]
    began = time.process_time()
    with pytest.raises(ConfigError, match=words) as refused:
        SearchConfig.from_text(text)
    with pytest.raises(ConfigError, match=words):
        ClientContext(config=text).search_config()
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(text)
    (tmp_path / "server.yml").write_text(text)
    monkeypatch.setenv("AGENTMERGE_SERVER_CONFIG", str(tmp_path / "server.yml"))
    with pytest.raises(ConfigError, match=words):
        ClientContext(config=GENOME).search_config()
    assert time.process_time() - began < 20
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_aliases_and_merged_keys_of_a_common_size_are_read() -> None:
    text = "base: &b {x: 1}\nother: {<<: *b, y: [*b, *b]}\nempty:\n"
    written = read_yaml(text, "c", ConfigError)
    assert written.value["other"] == {"x": 1, "y": [{"x": 1}, {"x": 1}]}
    assert written.lines["other.y"] == 2
    assert read_yaml("", "c", ConfigError).value is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{" * 5000,
        '{"a": ' * 50_000,
        "1" * 5000,
        '"\\ud800"',
        "[" + "1," * 11_000_000,
    ],
    ids=["lists", "objects", "nested", "digits", "half a character", "values"],
)
def test_absurd_json_is_refused(text: str) -> None:
    with pytest.raises(ParentError, match=r"config\.json"):
        parse_json(text.encode(), "config.json", ParentError)


def test_json_that_models_have_is_read() -> None:
    text = (
        '{"model_max_length": 1000000000000000019884624838656, "limit": [0.0, Infinity], '
        '"a": "\\ud83d\\ude00"}'
    )
    found = parse_json(text.encode(), "config.json", ParentError)
    assert found["limit"][1] == float("inf")
    assert found["a"] == "\N{GRINNING FACE}"


def test_the_command_line_says_it_in_bounded_memory(tmp_path: Path) -> None:
    """In a process of its own whose address space is limited: a device is not read to its end."""
    program = (
        "import resource, sys\n"
        "from agentmerge.cli.app import run_app\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "sys.exit(max(run_app(['check', name]) for name in sys.argv[1:]))\n"
    )
    (tmp_path / "bomb.yml").write_text(BOMB)
    files = ["/dev/zero", "/dev/stdin", str(tmp_path / "bomb.yml"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *files],
        capture_output=True,
        text=True,
        stdin=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(files)
    assert all(line.startswith("error: ") for line in lines)


def test_what_the_shell_pipes_in_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"KEY=1\n")
    os.close(writer)
    assert read_text(f"/dev/fd/{reader}", UserError) == "KEY=1\n"
    os.close(reader)
