"""Checkpoints of a family whose vocabularies differ, written anew under one tokenizer.

``vocabulary.py`` says which row goes where; here are the files: embedding and head with their rows
in the new order, the config's vocabulary size and token ids, the tokenizer. It knows no recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.parents.checkpoint import EMBEDDINGS, HEADS, Checkpoint, is_one_of
from agentmerge.parents.headers import chat_template, content_fingerprint, read_config, read_json
from agentmerge.parents.made import identity_of, made
from agentmerge.parents.naming import layer_of
from agentmerge.parents.vocabulary import Alignment
from agentmerge.parents.writing import (
    copy_side_files,
    entry_of,
    refuse_full_disk,
    stored_tensor,
    write_json,
    write_weights,
)

if TYPE_CHECKING:
    import torch

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors with a row a token: inner name -> name in the files. A bias is one that has a
    number a token."""
    text = checkpoint.text
    rows = own_rows(checkpoint)
    return {
        inner: own
        for inner, own in text.items()
        if is_one_of(own, EMBEDDINGS + HEADS)
        or (
            own.endswith("bias")
            and checkpoint.tensors[own].shape == (rows,)
            and layer_of(own) is None
        )
    }


def own_rows(checkpoint: Checkpoint) -> int:
    """How many rows a model's embedding has."""
    own = _embedding(checkpoint)
    return checkpoint.tensors[own].shape[0] if own else 0


def _embedding(checkpoint: Checkpoint) -> str | None:
    """The embedding's name in the files."""
    return next((own for own in checkpoint.text.values() if is_one_of(own, EMBEDDINGS)), None)


def aligned_checkpoint(checkpoint: Checkpoint, alignment: Alignment) -> Checkpoint:
    """Config and headers of a checkpoint as it will be."""
    tensors = dict(checkpoint.tensors)
    for own in vocabulary_tensors(checkpoint).values():
        shape = (alignment.rows, *tensors[own].shape[1:])
        tensors[own] = replace(tensors[own], shape=shape)
    return Checkpoint(_with_rows(checkpoint.config, alignment.rows), tensors)


def aligned_paths(paths: Mapping[str, Path], alignment: Alignment) -> dict[str, Path]:
    """The directory of each parent under the alignment's tokenizer: itself where it is already."""
    prints = {name: content_fingerprint(path) for name, path in paths.items()}
    places = sorted((prints[name], place.tolist()) for name, place in alignment.places.items())
    # A tokenizer lists its vocabulary in an order of chance.
    vocabulary = json.dumps([sorted(alignment.tokenizer.get_vocab().items()), places])
    rule = hashlib.sha256(vocabulary.encode()).hexdigest()
    base = prints.get(alignment.base or "", "")
    found = dict(paths)
    for name, path in paths.items():
        if alignment.changes(name):
            parts = [prints[name], base, prints[alignment.owner], *sorted(prints.values()), rule]
            side = [path.joinpath("config.json").read_text(), str(alignment.owner == name)]
            key = [*parts, hashlib.sha256("".join(side).encode()).hexdigest(), str(path)]
            found[name] = made(
                "aligned",
                key,
                partial(_write, name=name, paths=paths, alignment=alignment),
                identity_of("aligned", parts),
            )
    return found


def write_aligned_side_files(
    source: Path, directory: Path, alignment: Alignment, template: str | None
) -> None:
    """All of an aligned checkpoint but its weights. template: its own chat template."""
    copy_side_files(source, directory)
    for file in directory.glob("*"):
        if file.name.startswith(("tokenizer", "vocab.", "merges.", "added_tokens", "special_")):
            file.unlink()
    alignment.tokenizer.save_pretrained(directory)
    places = _new_ids(source, alignment)
    config = _with_rows(read_config(source), alignment.rows)
    write_json(directory / "config.json", _with_ids(config, places))
    generation = directory / "generation_config.json"
    if generation.is_file():
        write_json(generation, _with_ids(read_json(generation), places))
    chat = directory / "chat_template.jinja"
    chat.unlink(missing_ok=True)
    if template is not None:
        chat.write_text(template, encoding="utf-8")


def _write(directory: Path, name: str, paths: Mapping[str, Path], alignment: Alignment) -> None:
    checkpoints = {model: Checkpoint.read(path) for model, path in paths.items()}
    own = checkpoints[name]
    inner_of = {file: inner for inner, file in vocabulary_tensors(own).items()}

    def tensor_of(model: str, inner: str) -> torch.Tensor:
        checkpoint = checkpoints[model]
        names = vocabulary_tensors(checkpoint)
        file = names.get(inner) or str(_embedding(checkpoint))  # a head that is tied here
        return stored_tensor(checkpoint.tensors[file], file)

    def result(file: str) -> torch.Tensor:
        if file not in inner_of:
            return stored_tensor(own.tensors[file], file)
        return alignment.aligned(name, lambda model: tensor_of(model, inner_of[file]))

    entries = []
    for file, header in own.tensors.items():
        entry = entry_of(file, header)
        if file in inner_of:
            dtype = _widest(tensor_of(model, inner_of[file]).dtype for model in paths)
            shape = (alignment.rows, *header.shape[1:])
            size = _WIDTHS[dtype]
            for side in shape:
                size *= side
            entry = replace(entry, shape=shape, dtype=dtype, size_bytes=size)
        entries.append(entry)
    refuse_full_disk(directory, sum(entry.size_bytes for entry in entries), directory.parent)
    for _ in write_weights(directory, entries, result):
        pass
    write_aligned_side_files(paths[name], directory, alignment, chat_template(paths[name]))


def _widest(dtypes: Any) -> str:
    import torch

    found = None
    for dtype in dtypes:
        found = dtype if found is None else torch.promote_types(found, dtype)
    return str(found).removeprefix("torch.")


def _new_ids(source: Path, alignment: Alignment) -> dict[int, int]:
    """Old token id -> new one, of a parent by its directory's tokenizer."""
    from transformers import AutoTokenizer

    old = AutoTokenizer.from_pretrained(str(source)).get_vocab()
    new = alignment.tokenizer.get_vocab()
    return {index: new[token] for token, index in old.items() if token in new}


def _with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    result = dict(config)
    if isinstance(config.get("text_config"), Mapping):
        result["text_config"] = {**config["text_config"], "vocab_size": rows}
    if "vocab_size" in config or "text_config" not in config:
        result["vocab_size"] = rows
    return result


def _with_ids(body: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """Token ids of a config by the new tokenizer; one whose token is gone is left out."""
    result = dict(body)
    for key in _TOKEN_IDS:
        value = result.get(key)
        if isinstance(value, list):
            result[key] = [places[index] for index in value if index in places]
        elif isinstance(value, int):
            result[key] = places.get(value)
    if isinstance(body.get("text_config"), Mapping):
        result["text_config"] = _with_ids(body["text_config"], places)
    return result
