"""Finds what a user names: a model, or ``model+adapter``, on this machine or on the hub.

The words are mergekit's: a directory or a hub id, ``@revision`` behind a hub id, ``+`` between a
model and the adapter that is applied to it. A directory of the whole name wins, whatever is in its
name. It opens no weights, and knows no torch and nothing of other models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agentmerge.errors import ParentError
from agentmerge.parents.headers import read_config, read_json, refuse_odd_files, safetensors_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
#: The model card: its metadata names licence and languages (``cards.py``).
CARD = "README.md"
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", CARD)
_PICKLED = "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class Parent:
    """One parent: its name in recipes, its model's directory, and its adapter's if it has one.

    pickled: the model's weights where they are not safetensors, which the user has allowed.
    """

    name: str
    model: Path
    adapter: Path | None = None
    pickled: tuple[Path, ...] = ()


def find_parent(
    name: str, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Parent:
    """The parent that ``name`` names, downloaded where it is not here.

    trust_remote_code: also fetch the model's own Python files. allow_pickle: take
    ``pytorch_model.bin`` where there are no safetensors.

    Raises:
        ParentError: it cannot be found, or is not a whole model with an adapter or none.
    """
    model_name, _, adapter_name = name.partition("+")
    if "+" not in name or Path(name).expanduser().is_dir():
        model, adapter = _model(name, trust_remote_code, allow_pickle), None
    elif not model_name or not adapter_name or "+" in adapter_name:
        raise ParentError(f"{name!r} is not MODEL or MODEL+ADAPTER; name one model and one adapter")
    else:
        model = _model(model_name, trust_remote_code, allow_pickle)
        adapter = _adapter(adapter_name, allow_pickle)
    for folder in filter(None, (model, adapter)):
        refuse_odd_files(folder)
    read_config(model)
    pickled = pickled_files(model) if allow_pickle else ()
    if not pickled:
        safetensors_files(model)
    return Parent(name, model, adapter, pickled)


def pickled_files(directory: Path) -> tuple[Path, ...]:
    """A model's pickled weights, where it has no safetensors.

    Raises:
        ParentError: some of them are missing.
    """
    if any(directory.glob("*.safetensors")):
        return ()
    index = directory / f"{_PICKLED}.index.json"
    names = [_PICKLED] if (directory / _PICKLED).is_file() else []
    if not names and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_beside(shard) for shard in shards.values()):
            raise ParentError(f"{index} does not say which file beside it holds which tensor")
        names = sorted(set(shards.values()))
    missing = [file for file in names if not (directory / file).is_file()]
    if missing:
        raise ParentError(
            f"{directory}: {len(missing)} of {len(names)} files are missing, the first is "
            f"{missing[0]}; download the model again"
        )
    return tuple(directory / file for file in names)


def _beside(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _model(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    patterns = [*_MODEL_FILES]
    if trust_remote_code:
        patterns.append("*.py")
    if allow_pickle:
        patterns.append("pytorch_model*.bin")

    def is_whole(directory: Path) -> None:
        if not (allow_pickle and pickled_files(directory)):
            safetensors_files(directory)

    return _directory(name, patterns, is_whole)


def _adapter(name: str, allow_pickle: bool) -> Path:
    def is_whole(directory: Path) -> None:
        if not (directory / ADAPTER_CONFIG).is_file():
            raise ParentError(f"{directory} has no {ADAPTER_CONFIG}; name an adapter behind the +")
        if (directory / ADAPTER_WEIGHTS).is_file():
            return
        if not (directory / PICKLED_ADAPTER).is_file():
            raise ParentError(f"{directory} has no {ADAPTER_WEIGHTS}; the adapter is not whole")
        if not allow_pickle:
            raise ParentError(
                f"{directory} has only pickled weights ({PICKLED_ADAPTER}), not safetensors; "
                "convert them, or set worker.allow_pickle: true"
            )

    files = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, *([PICKLED_ADAPTER] if allow_pickle else [])]
    directory = _directory(name, files, is_whole)
    is_whole(directory)
    return directory


def _directory(name: str, patterns: Sequence[str], is_whole: Callable[[Path], None]) -> Path:
    local = Path(name).expanduser()
    if local.is_dir():
        return local.absolute()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ParentError(f"{name!r} is not a directory; name a model's directory or a hub id")
    return _from_hub(name, patterns, is_whole)


def _from_hub(name: str, patterns: Sequence[str], is_whole: Callable[[Path], None]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    fetch = partial(
        huggingface_hub.snapshot_download,
        repository,
        revision=revision or None,
        allow_patterns=list(patterns),
        ignore_patterns=["original/*", "consolidated*"],  # a second copy in some repositories
    )
    try:
        try:
            cached = Path(fetch(local_files_only=True))
            is_whole(cached)
            return cached
        except (errors.LocalEntryNotFoundError, ParentError):
            return Path(fetch())
    except errors.HFValidationError:
        why = "is neither a directory nor a hub id; name a model's directory or a hub id"
    except errors.GatedRepoError:
        why = "is gated on the hub; ask for access there and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "is neither a directory nor a model on the hub (if it is private, set HF_TOKEN)"
    except Exception as error:  # the hub client's transport, and so its errors, vary by version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        why = (
            "is not a directory, is not in the hub's local cache, and cannot be downloaded: "
            f"{reason}"
        )
    raise ParentError(f"{name!r} {why}")
