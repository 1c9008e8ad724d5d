"""Turns the parents that a user names into plain checkpoints: one directory of safetensors each.

First ``survey``: every fault, and what would have to be made, from configs and headers alone. Then
``make_plain``: adapters applied, pickled weights converted, each once on this machine
(``made.py``). A parent that is a plain checkpoint already stays where it is. It knows no recipes
and no tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentmerge.errors import ParentError
from agentmerge.parents.adapters import (
    adapter_faults,
    adapter_fingerprint,
    adapter_note,
    low_rank_bytes,
)
from agentmerge.parents.aligning import (
    aligned_checkpoint,
    aligned_paths,
    own_rows,
    write_aligned_side_files,
)
from agentmerge.parents.checkpoint import Checkpoint, parts_of
from agentmerge.parents.headers import (
    chat_template,
    content_fingerprint,
    file_digest,
    known_fingerprint,
    read_config,
)
from agentmerge.parents.made import identity_of, made
from agentmerge.parents.sources import Parent
from agentmerge.parents.vocabulary import (
    Alignment,
    align,
    read_tokens,
    token_differences,
    tokens_apart,
)
from agentmerge.parents.writing import (
    Entry,
    copy_side_files,
    entry_of,
    refuse_full_disk,
    stored_tensor,
    write_json,
    write_weights,
)
from agentmerge.system.temporary import temporary_folder


@dataclass(frozen=True)
class Survey:
    """What parents are, before any weight is read.

    checkpoints: name -> config and headers of the plain checkpoint that it is or will be.
    faults, notes: one sentence each. made_bytes: of the checkpoints that have to be made.
    low_rank: of adapters that are held as such, the model that each is of (as a parent, else where
    it is) and the bytes that its factors take.
    """

    checkpoints: Mapping[str, Checkpoint]
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()
    made_bytes: Mapping[str, int] = field(default_factory=dict)
    alignment: Alignment | None = None
    low_rank: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def write_side_files(self, parent: Parent, directory: Path) -> None:
        """All of the checkpoint that ``parent`` will be but its weights."""
        if self.alignment is None or not self.alignment.changes(parent.name):
            write_side_files(parent, directory)
            return
        template = None if parent.adapter is None else chat_template(parent.adapter)
        template = template or chat_template(parent.model)
        write_aligned_side_files(parent.model, directory, self.alignment, template)


def survey(
    parents: Sequence[Parent],
    base: str | None = None,
    tokenizer_source: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Survey:
    """What ``parents`` are and what speaks against each of them by itself.

    base: whose names the tensors of all get, by default the first's. tokenizer_source: mergekit's;
        without it, a row of the vocabulary has to be the same token in all.
    """
    checkpoints: dict[str, Checkpoint] = {}
    faults, notes, made_bytes = [], [], {}
    low_rank: dict[str, tuple[str, int]] = {}
    whole = {parent.model: parent.name for parent in parents if parent.adapter is None}
    for parent in parents:
        try:
            checkpoints[parent.name] = checkpoint = _read(parent)
            if parent.adapter is not None:
                found = _adapter_faults(parent.adapter, checkpoint)
                faults += [f"{parent.name}: {fault}" for fault in found]
                note = adapter_note(parent.name, parent.adapter, parent.name.partition("+")[0])
                notes += [note] if note else []
                size = None if found else low_rank_bytes(parent.adapter, checkpoint.tensors)
                if size is not None:
                    ground = whole.get(parent.model, str(parent.model))
                    low_rank[parent.name] = ground, size
        except ParentError as error:
            faults.append(f"{parent.name}: {error}")
            continue
        times = bool(parent.pickled) + (parent.adapter is not None)
        if times:
            made_bytes[parent.name] = times * _size_bytes(checkpoint)
    if not checkpoints:
        return Survey({}, faults, notes)
    owner = base if base in checkpoints else next(iter(checkpoints))
    first = checkpoints[owner]
    for name, checkpoint in checkpoints.items():
        if _other_names(checkpoint, first.text):
            entries = _text_entries(checkpoint, first.text).values()
            made_bytes[name] = made_bytes.get(name, 0) + sum(e.size_bytes for e in entries)
            low_rank.pop(name, None)
    if first.carried:
        notes.append(
            f"{len(first.carried)} tensors outside the text model are taken over from {owner}: "
            f"{parts_of(first.carried)}"
        )
    directories = {p.name: p.model for p in parents if p.name in checkpoints}
    if tokenizer_source is None:
        more, said = _token_differences(directories, checkpoints, owner)
        return Survey(checkpoints, faults + more, notes + said, made_bytes, low_rank=low_rank)
    try:
        alignment = _alignment(
            directories, checkpoints, tokenizer_source, base, trust_remote_code=trust_remote_code
        )
    except ParentError as error:
        return Survey(checkpoints, [*faults, str(error)], notes, made_bytes)
    for name, checkpoint in checkpoints.items():
        if alignment.changes(name):
            checkpoints[name] = aligned_checkpoint(checkpoint, alignment)
            made_bytes[name] = made_bytes.get(name, 0) + _size_bytes(checkpoint)
            low_rank.pop(name, None)
    return Survey(checkpoints, faults, notes, made_bytes, alignment, low_rank)


def _token_differences(
    directories: Mapping[str, Path], checkpoints: Mapping[str, Checkpoint], first: str
) -> tuple[list[str], list[str]]:
    """Of every parent and the first, where both tokenizers can be read."""
    faults, notes = [], []
    one = read_tokens(directories[first])
    for name, checkpoint in checkpoints.items():
        two = read_tokens(directories[name])
        if name == first or one is None or two is None:
            continue
        if own_rows(checkpoint) == own_rows(checkpoints[first]):
            more, said = token_differences(first, one, name, two)
            faults += more
            notes += said
        else:  # the number of rows is a fault of its own
            faults.append(tokens_apart(first, one, name, two))
    return faults, notes


def _alignment(
    directories: Mapping[str, Path],
    checkpoints: Mapping[str, Checkpoint],
    source: str,
    base: str | None,
    *,
    trust_remote_code: bool,
) -> Alignment:
    rows = {name: own_rows(checkpoint) for name, checkpoint in checkpoints.items()}
    base = base if base in directories else None
    return align(directories, rows, source, base, trust_remote_code=trust_remote_code)


def make_plain(
    parents: Iterable[Parent],
    base: str | None = None,
    tokenizer_source: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:
    """The directory of each parent's plain checkpoint, by name; made where it is not there yet.

    base, tokenizer_source: as in ``survey``.

    Raises:
        ParentError: it cannot be made.
        UserError: the cache directory cannot be written, or the disk is full.
    """
    paths = {parent.name: _plain(parent, trust_remote_code) for parent in parents}
    names = Checkpoint.read(paths[base or next(iter(paths))]).text
    paths = {name: _under_names(path, names) for name, path in paths.items()}
    if tokenizer_source is None:
        return paths
    checkpoints = {name: Checkpoint.read(path) for name, path in paths.items()}
    alignment = _alignment(
        paths, checkpoints, tokenizer_source, base, trust_remote_code=trust_remote_code
    )
    return aligned_paths(paths, alignment)


def known_identities(parents: Iterable[Parent]) -> dict[str, str]:
    """The content fingerprints that are known without reading a weight."""
    known = {}
    for parent in parents:
        found = None if parent.pickled else known_fingerprint(parent.model)
        if found and parent.adapter is not None:
            found = identity_of("adapter", [found, adapter_fingerprint(parent.adapter)])
        if found:
            known[parent.name] = found
    return known


def write_side_files(parent: Parent, directory: Path) -> None:
    """All of a parent's plain checkpoint but its weights."""
    write_json(directory / "config.json", read_config(parent.model))
    copy_side_files(parent.model, directory)
    template = None if parent.adapter is None else chat_template(parent.adapter)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _read(parent: Parent) -> Checkpoint:
    if not parent.pickled:
        return Checkpoint.read(parent.model)
    from agentmerge.parents.pickled import pickled_headers

    return Checkpoint(read_config(parent.model), pickled_headers(parent.pickled))


def _adapter_faults(adapter: Path, checkpoint: Checkpoint) -> list[str]:
    tied, _ = checkpoint.tying(compare=False)
    return list(adapter_faults(adapter, checkpoint.tensors, tied is not False))


def _plain(parent: Parent, trust_remote_code: bool) -> Path:
    model = parent.model
    if parent.pickled:
        from agentmerge.parents.pickled import convert

        bare = Parent(parent.name, parent.model)

        def make_converted(directory: Path) -> None:
            convert(parent.pickled, directory)
            write_side_files(bare, directory)

        # Known by its weights alone: the same model as safetensors is the same parent.
        files = [file_digest(file) for file in parent.pickled]
        model = made("converted", [*files, _side_digest(bare)], make_converted, identity="")
    if parent.adapter is None:
        return model
    adapter = parent.adapter
    from agentmerge.parents.applying import apply_adapter

    def make_applied(directory: Path) -> None:
        apply_adapter(model, adapter, directory, trust_remote_code=trust_remote_code)
        write_side_files(parent, directory)

    prints = [content_fingerprint(model), adapter_fingerprint(adapter)]
    identity = identity_of("adapter", prints)
    # "factors": made anew where it was made before they were kept beside the weights.
    return made("adapter", [*prints, _side_digest(parent), "factors"], make_applied, identity)


def _other_names(checkpoint: Checkpoint, names: Mapping[str, str]) -> bool:
    """Whether its text model's tensors are called otherwise than ``names`` (inner -> in files)."""
    return any(names.get(inner, own) != own for inner, own in checkpoint.text.items())


def _text_entries(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Entry]:
    """Its tensors' own names -> what is to be written of each under the names of another."""
    return {
        own: entry_of(names.get(inner, own), checkpoint.tensors[own])
        for inner, own in checkpoint.text.items()
    }


def _under_names(path: Path, names: Mapping[str, str]) -> Path:
    """The text model of a checkpoint under the names of another; itself where it has those."""
    checkpoint = Checkpoint.read(path)
    if not _other_names(checkpoint, names):
        return path
    entries = _text_entries(checkpoint, names)
    own_names = {entry.name: own for own, entry in entries.items()}
    bare = Parent(path.name, path)

    def make(directory: Path) -> None:
        refuse_full_disk(directory, sum(e.size_bytes for e in entries.values()), directory.parent)
        for _ in write_weights(
            directory,
            list(entries.values()),
            lambda name: stored_tensor(checkpoint.tensors[own_names[name]], own_names[name]),
        ):
            pass
        write_side_files(bare, directory)

    identity = content_fingerprint(path)
    return made("renamed", [identity, *own_names, _side_digest(bare)], make, identity)


def _side_digest(parent: Parent) -> str:
    """A hash of what ``write_side_files`` writes."""
    with temporary_folder("agentmerge-parent") as scratch:
        write_side_files(parent, scratch)
        files = sorted(file for file in scratch.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(scratch)} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _size_bytes(checkpoint: Checkpoint) -> int:
    return sum(header.end - header.start for header in checkpoint.tensors.values())
