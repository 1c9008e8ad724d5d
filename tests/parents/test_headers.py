"""Headers, fingerprints and names: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentmerge.errors import ParentError
from agentmerge.parents import headers
from agentmerge.parents.headers import (
    content_fingerprint,
    num_layers,
    read_headers,
    same_bytes,
    text_config,
)
from agentmerge.parents.sources import find_parent
from tests.merging.merge_cases import edit_weights, load_all


def shard(directory: Path) -> None:
    """Turn a single-file model into two shards and an index."""
    weights = load_all(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    where = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file)
        where |= dict.fromkeys(part, file)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_headers_say_shape_dtype_and_file(own_family: dict[str, Path]) -> None:
    directory = own_family["base"]
    found = read_headers(directory)
    assert found.keys() == load_all(directory).keys()
    norm = found["model.norm.weight"]
    assert (norm.shape, norm.dtype, norm.file) == (
        (16,),
        "float32",
        directory / "model.safetensors",
    )
    assert norm.end - norm.start == 64


def test_shards_are_one_model(own_family: dict[str, Path]) -> None:
    before = {name: (h.shape, h.dtype) for name, h in read_headers(own_family["a"]).items()}
    shard(own_family["a"])
    assert {n: (h.shape, h.dtype) for n, h in read_headers(own_family["a"]).items()} == before


def test_the_fingerprint_is_of_the_content(own_family: dict[str, Path], tmp_path: Path) -> None:
    first = content_fingerprint(own_family["a"])
    assert len(first) == 64
    assert first != content_fingerprint(own_family["b"])
    moved = tmp_path / "moved"
    shutil.copytree(own_family["a"], moved)
    shard(moved)
    assert content_fingerprint(moved) == first
    weights = load_all(moved)
    weights["model.norm.weight"][3] += 1e-3
    (moved / "model.safetensors.index.json").unlink()
    save_file(weights, moved / "model.safetensors")
    assert content_fingerprint(moved) != first


def test_the_fingerprint_sees_a_renamed_tensor(own_family: dict[str, Path]) -> None:
    first = content_fingerprint(own_family["a"])
    weights = load_all(own_family["a"])
    weights["model.norm2.weight"] = weights.pop("model.norm.weight")
    save_file(weights, own_family["a"] / "model.safetensors")
    assert content_fingerprint(own_family["a"]) != first


def test_the_fingerprint_is_remembered_until_the_file_changes(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "own-cache"))
    file = own_family["a"] / "model.safetensors"
    long_ago = time.time() - 100
    os.utime(file, (long_ago, long_ago))
    first = content_fingerprint(own_family["a"])
    reads = []
    monkeypatch.setattr(headers, "_chunks", lambda header: reads.append(header) or iter(()))
    assert content_fingerprint(own_family["a"]) == first
    assert not reads
    os.utime(file, (long_ago + 1, long_ago + 1))
    content_fingerprint(own_family["a"])
    assert reads


def test_a_file_of_this_moment_is_not_remembered(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change once more without a new time."""
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "own-cache"))
    (own_family["a"] / "model.safetensors").touch()
    content_fingerprint(own_family["a"])
    assert not (tmp_path / "own-cache").exists()


def cache_file(cache: Path) -> Path:
    return cache / f"fingerprints-{os.geteuid()}.json"


@pytest.mark.parametrize("spoilt", ["another user's", "open to everybody", "no hash"])
def test_what_others_say_of_weights_in_a_shared_cache_is_not_believed(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    cache = tmp_path / "own-cache"
    monkeypatch.setenv("AGENTMERGE_CACHE", str(cache))
    os.utime(own_family["a"] / "model.safetensors", (1e9, 1e9))
    want, other = content_fingerprint(own_family["a"]), content_fingerprint(own_family["b"])
    assert want != other
    forged = "0" * 63 + "." if spoilt == "no hash" else other
    known = json.loads(cache_file(cache).read_text())
    cache_file(cache).write_text(json.dumps(dict.fromkeys(known, forged)))
    if spoilt == "open to everybody":
        cache_file(cache).chmod(0o666)
    elif spoilt == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert content_fingerprint(own_family["a"]) == want


def test_a_model_that_says_it_was_made_of_another_is_what_its_weights_are(
    own_family: dict[str, Path],
) -> None:
    want = content_fingerprint(own_family["a"])
    claim = {"identity": content_fingerprint(own_family["b"]), "content": want}
    (own_family["a"] / headers.MADE).write_text(json.dumps(claim))
    assert content_fingerprint(own_family["a"]) == want


@pytest.mark.parametrize("spoilt", ["a file in its place", "not JSON", "a list"])
def test_a_cache_that_is_of_no_use_does_no_harm(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    want = content_fingerprint(own_family["a"])
    cache = tmp_path / "own-cache"
    if spoilt == "a file in its place":
        cache.write_text("x")
    else:
        cache.mkdir()
        cache_file(cache).write_text("{" if spoilt == "not JSON" else "[1]")
    monkeypatch.setenv("AGENTMERGE_CACHE", str(cache))
    os.utime(own_family["a"] / "model.safetensors", (1e9, 1e9))
    assert content_fingerprint(own_family["a"]) == want
    assert content_fingerprint(own_family["a"]) == want


def test_same_bytes(own_family: dict[str, Path]) -> None:
    weights = load_all(own_family["a"])
    weights["copy"] = weights["model.norm.weight"].clone()
    weights["reshaped"] = weights["model.norm.weight"].reshape(4, 4).clone()
    weights["other"] = weights["model.norm.weight"] + 1
    save_file(weights, own_family["a"] / "model.safetensors")
    found = read_headers(own_family["a"])
    norm = found["model.norm.weight"]
    assert same_bytes(norm, found["copy"])
    assert not same_bytes(norm, found["reshaped"])
    assert not same_bytes(norm, found["other"])


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 3}, 3),
        ({"n_layer": 4}, 4),
        ({"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 5}}, 5),
    ],
)
def test_the_number_of_layers(config: dict[str, object], layers: int) -> None:
    assert num_layers(config) == layers
    assert text_config(config).get("text_config") is None


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(ParentError, match="number of layers is unknown"):
        num_layers({"model_type": "odd"})


def spoil(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    if how == "cut off":
        weights.write_bytes(content[:-10])
    elif how == "not safetensors":
        weights.write_bytes(b"<html>not found</html>" * 40)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "pickled only":
        weights.rename(directory / "pytorch_model.bin")
    elif how == "adapter":
        weights.rename(directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text("{}")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (directory / "config.json").unlink()
    elif how == "config cut off":
        (directory / "config.json").write_text('{"a": ')
    elif how == "two loose files":
        shutil.copy(weights, directory / "one.safetensors")
        weights.rename(directory / "two.safetensors")
    else:
        shard(directory)
        index = directory / "model.safetensors.index.json"
        content_of = json.loads(index.read_text())
        if how == "shard missing":
            (directory / "model-00002-of-00002.safetensors").unlink()
        elif how == "index lies":
            content_of["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
            content_of["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
        elif how == "index leaves the directory":
            content_of["weight_map"]["model.norm.weight"] = "../base/model.safetensors"
        elif how == "index empty":
            content_of = {}
        index.write_text(json.dumps(content_of))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut off", "not a whole safetensors file"),
        ("not safetensors", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("pickled only", "only pickled weights"),
        ("adapter", r"is an adapter, not a whole model; name it with its model, as MODEL\+"),
        ("no weights", "no safetensors files"),
        ("two loose files", "2 safetensors files and no model.safetensors.index.json"),
        ("shard missing", "1 of 2 shards are missing, the first is model-00002"),
        ("index lies", "and it is not"),
        ("index leaves the directory", "not a file beside it"),
        ("index empty", "no 'weight_map'"),
    ],
)
def test_broken_models_are_refused(own_family: dict[str, Path], how: str, words: str) -> None:
    spoil(own_family["a"], how)
    with pytest.raises(ParentError, match=words):
        read_headers(own_family["a"])


@pytest.mark.parametrize("how", ["no config", "config cut off", "pickled only", "adapter"])
def test_a_directory_that_is_no_model_does_not_resolve(
    own_family: dict[str, Path], how: str
) -> None:
    spoil(own_family["a"], how)
    with pytest.raises(ParentError):
        find_parent(str(own_family["a"]))


def test_names(own_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_family["a"].parent)
    assert find_parent("a").model == own_family["a"]
    assert find_parent("./a").model == own_family["a"]
    for name, words in (
        ("a+nowhere/at/all", "is not a directory"),
        ("a+", "name one model and one adapter"),
        ("a+b+b", "name one model and one adapter"),
        ("a+b", "has no adapter_config.json; name an adapter behind"),
        ("./nowhere", "is not a directory"),
        ("/no/where", "is not a directory"),
        ("one/two/three", "is not a directory"),
        ("not a name", "neither a directory nor a hub id"),
    ):
        with pytest.raises(ParentError, match=words):
            find_parent(name)


def test_a_hub_id_from_the_cache_and_one_that_is_not_there(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(own_family["a"], snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "from agentmerge.errors import ParentError\n"
        "from agentmerge.parents.sources import find_parent\n"
        "print(find_parent('some/model').model)\n"
        "try: find_parent('some/other')\n"
        "except ParentError as error: print(error)\n"
        "print(find_parent('some/model@main').model)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, second, third = done.stdout.strip().splitlines()
    assert first == third == str(snapshot)
    assert "'some/other' is not a directory, is not in the hub's local cache" in second


def test_headers_and_plans_load_no_torch() -> None:
    code = "import agentmerge.merging.plan, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_integers_keep_their_own_dtype_name(own_family: dict[str, Path]) -> None:
    edit_weights(own_family["a"], extra__ids=torch.arange(3))
    assert read_headers(own_family["a"])["extra.ids"].dtype == "I64"
