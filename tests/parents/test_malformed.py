"""Model folders that are not what they should be: one sentence that names the file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmerge.errors import ParentError
from agentmerge.parents.headers import chat_template, file_headers, read_config
from agentmerge.parents.sources import find_parent
from agentmerge.parents.vocabulary import read_tokens
from agentmerge.parents.writing import copy_side_files

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def second(**changes: Any) -> dict[str, Any]:
    """A header whose second tensor is changed."""
    return {"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]} | changes}


HEADERS: dict[str, Any] = {
    "overlapping": second(data_offsets=[4, 12]),
    "the same bytes": second(data_offsets=[0, 8]),
    "a gap": second(data_offsets=[12, 20]),
    "negative": second(data_offsets=[-8, 0]),
    "floats": second(data_offsets=[8.0, 16.0]),
    "backwards": second(data_offsets=[16, 8]),
    "far": second(data_offsets=[8, 1 << 60]),
    "three offsets": second(data_offsets=[8, 12, 16]),
    "true": second(data_offsets=[True, 9]),
    "an unknown dtype": second(dtype="F99"),
    "a dtype that is a number": second(dtype=7),
    "a dtype that is a list": second(dtype=[]),
    "a dtype of another size": second(dtype="F64"),
    "a negative shape": second(shape=[-2]),
    "a shape of floats": second(shape=[2.0]),
    "a shape beyond all": second(shape=[1 << 62, 1 << 62]),
    "a shape that is text": second(shape="2"),
    "bytes that belong to nobody": {"a": ENTRY},
    "a list": [1, 2],
    "an entry that is none": {"a": 7},
    "nothing": b"",
    "no JSON": b"\xff\xfe{",
    "nested": b'{"a": ' * 30_000 + b"}" * 30_000,
    "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    "a million tensors": b"{"
    + b",".join(
        b'"%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % i for i in range(900_000)
    )
    + b"}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_breaks_the_format_is_named(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", HEADERS[name])
    began = time.monotonic()
    with pytest.raises(ParentError, match=r"model\.safetensors") as refused:
        file_headers(file)
    assert time.monotonic() - began < 10
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("length", [0, 1 << 20, 10 << 30, 1 << 63])
def test_a_header_longer_than_its_file_is_not_read(length: int, tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="not a whole safetensors file"):
        file_headers(write(tmp_path / "x.safetensors", {"a": ENTRY}, length=length))


def test_a_header_as_the_format_has_it_is_read(tmp_path: Path) -> None:
    empty = {"dtype": "BF16", "shape": [0, 4], "data_offsets": [16, 16]}
    header = {"__metadata__": {"format": "pt"}, "z": empty} | second(dtype="I32")
    found = file_headers(write(tmp_path / "x.safetensors", header))
    assert {name: h.end - h.start for name, h in found.items()} == {"z": 0, "a": 8, "b": 8}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def _nested(path: Path) -> None:
    path.write_bytes(b'{"a": ' * 50_000)


def _null(path: Path) -> None:
    path.write_text("null")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00{]")


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


@pytest.mark.parametrize("spoil", [_pipe, _device])
@pytest.mark.parametrize(
    "name", ["tokenizer.zero", "vocab.bpe", "additional_chat_templates/a.jinja"]
)
def test_what_would_be_copied_for_ever_is_named(
    own_family: dict[str, Path], tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    file = own_family["a"] / name
    file.parent.mkdir(exist_ok=True)
    spoil(file)
    with pytest.raises(ParentError, match=file.name.replace(".", r"\.")):
        find_parent(str(own_family["a"]))
    with pytest.raises(ParentError, match=file.name.replace(".", r"\.")):
        copy_side_files(own_family["a"], tmp_path)


def test_a_folder_among_the_side_files_is_not_followed(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "private" / "deep").mkdir(parents=True)
    (tmp_path / "private" / "deep" / "key.jinja").write_text("secret")
    for name in ("additional_chat_templates", "tokenizer_x"):
        (own_family["a"] / name).symlink_to(tmp_path / "private")
    (tmp_path / "out").mkdir()
    copy_side_files(own_family["a"], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("key.jinja"))


@pytest.mark.parametrize(
    "spoil", [_pipe, _device, _link_to_nowhere, _nested, _null, _garbage, _huge]
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_side_file_that_is_none_is_named_before_anybody_reads_it(
    own_family: dict[str, Path], name: str, spoil: Callable[[Path], None]
) -> None:
    file = own_family["a"] / name
    file.unlink(missing_ok=True)
    spoil(file)
    began = time.monotonic()
    with pytest.raises(ParentError, match=name.replace(".", r"\.")):
        find_parent(str(own_family["a"]))
    assert time.monotonic() - began < 5
    chat_template(own_family["a"])
    read_tokens(own_family["a"])


@pytest.mark.parametrize("spoil", [_pipe, _device, _huge])
def test_weights_that_are_no_file_are_not_opened(
    own_family: dict[str, Path], spoil: Callable[[Path], None]
) -> None:
    file = own_family["a"] / "model.safetensors"
    file.unlink()
    spoil(file)
    with pytest.raises(ParentError, match=r"model\.safetensors|no safetensors"):
        file_headers(find_parent(str(own_family["a"])).model / file.name)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "", "a\0b", 7, None])
def test_an_index_does_not_lead_out_of_its_folder(
    own_family: dict[str, Path], shard: object
) -> None:
    folder = own_family["a"]
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ParentError, match=str(folder)):
        find_parent(str(folder))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("size", [1e308, -1, 0.5, "x", float("nan"), {}])
def test_a_size_that_no_model_has_is_refused(
    own_family: dict[str, Path], key: str, size: object
) -> None:
    file = own_family["a"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: size}))
    with pytest.raises(ParentError, match=rf"config\.json: {key}"):
        read_config(own_family["a"])


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": {"rope_theta": [1]}},
        {"rope_scaling": 7, "rope_parameters": None},
        {"architectures": 7},
    ],
)
def test_a_value_of_another_type_is_named(
    own_family: dict[str, Path], changes: dict[str, Any]
) -> None:
    file = own_family["a"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ParentError, match=r"config\.json has a value"):
        read_config(own_family["a"])


@pytest.mark.parametrize("layers", [10**9, -1, float("nan"), float("inf"), 1e300])
def test_a_depth_that_no_model_has_is_refused_before_it_is_built(
    own_family: dict[str, Path], layers: float
) -> None:
    file = own_family["a"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(ParentError, match=r"config\.json: num_hidden_layers"):
        read_config(own_family["a"])


@pytest.mark.parametrize("template", [7, True, [], [7], [{"name": "default", "template": 3}], {}])
def test_a_chat_template_of_another_type_is_none(
    own_family: dict[str, Path], template: object
) -> None:
    file = own_family["a"] / "tokenizer_config.json"
    (own_family["a"] / "chat_template.jinja").unlink(missing_ok=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert chat_template(own_family["a"]) is None


@pytest.mark.parametrize("ids", ["x", [None, "y"], {}, 1.5])
def test_a_generation_config_without_token_ids_is_named(
    own_family: dict[str, Path], ids: object
) -> None:
    from transformers import AutoConfig

    from agentmerge.workers.conditions import ends_of

    folder = own_family["a"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ParentError, match=r"generation_config\.json cannot be used"):
        ends_of(folder, AutoConfig.from_pretrained(folder))
