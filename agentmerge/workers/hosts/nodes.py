"""What another machine must have before a worker is built there: the search's versions, and its
parents, which are known by name and content and lie wherever that machine has them.

Reads headers and fingerprints; knows no cluster and no worker.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agentmerge.contracts.worker import Sources, WorkerSpec
from agentmerge.errors import NoRoom, ParentError, RunFailed
from agentmerge.parents.headers import content_fingerprint, refuse_replaced, stamps_of

#: What computes an answer; another version of it would answer under another key, or otherwise.
_PACKAGES = ("agentmerge", "torch", "transformers", "lm_eval", "vllm")


def versions() -> dict[str, str]:
    """Of this process's Python and of what answers depend on; "" for what is not installed."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What is of another version there than here, in words; "" where nothing is."""
    return ", ".join(
        f"{name} {there.get(name) or 'missing'} and not {own or 'none'}"
        for name, own in here.items()
        if there.get(name, "") != own
    )


def refuse_other_versions(here: Mapping[str, str]) -> None:
    """Raises NoRoom where this machine's versions are not those of the search."""
    if found := differing(versions(), here):
        raise NoRoom(
            f"node {socket.gethostname()} has {found}; install the same there, or leave it out "
            "of the cluster"
        )


def at_home(spec: WorkerSpec) -> WorkerSpec:
    """The spec with every parent where this machine has it, fetched or made where it must be.

    Raises:
        NoRoom: a parent is not here, or another one than the search's.
    """
    if spec.sources is None or _same_files(spec):
        return spec
    identities = dict(spec.sources.identities)
    found = {name: Path(path) for name, path in spec.parents}
    if any(not path.is_dir() or _identity(path) != identities[n] for n, path in found.items()):
        found = _own_copies(spec, spec.sources)
    for name, path in found.items():
        if (identity := _identity(path)) != identities[name]:
            raise NoRoom(
                f"node {socket.gethostname()} has another {name!r} than the search: {path} has "
                f"the fingerprint {identity[:12]}, not {identities[name][:12]}; copy the search's "
                "there, or name the folder that holds it in worker.paths"
            )
    stamps = tuple(stamp for path in found.values() for stamp in stamps_of(path))
    return replace(spec, parents=tuple((n, str(p)) for n, p in found.items()), stamps=stamps)


def _same_files(spec: WorkerSpec) -> bool:
    """Whether the very files that the search looked at are here: it is its machine, or its disk."""
    try:
        refuse_replaced(spec.stamps)
    except RunFailed:
        return False
    return bool(spec.stamps)


def _identity(path: Path) -> str:
    try:
        return content_fingerprint(path)
    except ParentError as error:
        raise NoRoom(f"node {socket.gethostname()}: {error}") from error


def _own_copies(spec: WorkerSpec, sources: Sources) -> dict[str, Path]:
    """As the search itself finds and makes them, with the roots in front."""
    from agentmerge.parents.plain import make_plain
    from agentmerge.parents.sources import find_parent

    trust, base = spec.trust_remote_code, spec.options.get("base")
    names = dict(spec.parents)
    try:
        parents = [
            replace(
                find_parent(
                    "+".join(_rooted(part, sources.roots) for part in name.split("+")),
                    trust_remote_code=trust,
                    allow_pickle=sources.allow_pickle,
                ),
                name=name,
            )
            for name in names
        ]
        return make_plain(
            parents,
            base if base in names else None,
            sources.tokenizer_source,
            trust_remote_code=trust,
        )
    except ParentError as error:
        raise NoRoom(
            f"node {socket.gethostname()} cannot find the parents: {error}; copy them there, and "
            "name the folder that holds them in worker.paths"
        ) from error


def _rooted(name: str, roots: tuple[str, ...]) -> str:
    """The name's folder under a root, by its whole name or the last part of it; else the name."""
    for root in roots:
        for place in (Path(root).expanduser() / name, Path(root).expanduser() / Path(name).name):
            if place.is_dir():
                return str(place)
    return name
