"""Vocabularies of a family: what speaks against merging rows as they are, and how rows are aligned.

Rows are merged by their place, so a place has to mean the same token in every parent. Where it
does not, ``tokenizer_source`` says which tokenizer the merge has (mergekit builds it), and every
parent's rows are put in its order. A token that a parent lacks has the base's row, or else the mean
of the rows of those that have it (one of one is itself), or else zeros, as in mergekit. Rows that
belong to no token are kept. It knows tokenizers and rows; files are written by ``aligning.py``.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.errors import ParentError
from agentmerge.parents.configs import quiet_logs
from agentmerge.system.bounded import read_json

if TYPE_CHECKING:
    import torch

#: Tokens that a sentence names.
_NAMED = 8

#: Token -> its row, and which of the tokens were added to the vocabulary (special ones, mostly).
Tokens = tuple[dict[str, int], frozenset[str]]


def read_tokens(directory: Path) -> Tokens | None:
    """The tokens of a model, from ``tokenizer.json`` alone; None where it has none."""
    try:
        body = read_json(directory / "tokenizer.json", ParentError)
        vocabulary = body["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            ids = {str(entry[0]): index for index, entry in enumerate(vocabulary)}
        else:
            ids = {str(token): int(index) for token, index in vocabulary.items()}
        added = {str(entry["content"]): int(entry["id"]) for entry in body.get("added_tokens", ())}
    except (ParentError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return ids | added, frozenset(added)


def token_differences(
    first: str, one: Tokens, other: str, two: Tokens
) -> tuple[list[str], list[str]]:
    """(faults, notes) of two tokenizers whose models have equally many rows.

    A row that is an ordinary token in both and not the same is a fault. One that has another name
    among added tokens (a reserved place put to use) or a token in one model only is a note.
    """
    ours = {index: token for token, index in one[0].items()}
    theirs = {index: token for token, index in two[0].items()}
    differing = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    added = one[1] | two[1]
    ordinary = [i for i in differing if not {ours[i], theirs[i]} & added]
    if ordinary:
        at = ordinary[0]
        return [
            f"{other}: row {at} of the vocabulary is token {theirs[at]!r}, and {ours[at]!r} in "
            f"{first} ({len(ordinary)} rows differ); set tokenizer_source to align them"
        ], []
    notes = []
    if differing:
        at = differing[0]
        notes.append(
            f"{other}: row {at} of the vocabulary is token {theirs[at]!r}, and {ours[at]!r} in "
            f"{first} ({len(differing)} added tokens differ); their rows are merged as they are"
        )
    alone = sorted(theirs.keys() ^ ours.keys())
    if alone:
        at = alone[0]
        owner = other if at in theirs else first
        notes.append(
            f"{other}: {len(alone)} tokens are not in both it and {first}, the first is "
            f"{(theirs.get(at) or ours.get(at))!r} of {owner}; rows are merged as they are"
        )
    return [], notes


def tokens_apart(first: str, one: Tokens, other: str, two: Tokens) -> str:
    """Which tokens two vocabularies of unequal size do not share."""
    if one[0].keys() == two[0].keys():
        return f"{other}: its tokens are those of {first}; the rows beyond them are padding"
    said = []
    for name, mine, theirs in ((other, two[0], one[0]), (first, one[0], two[0])):
        alone = sorted(mine.keys() - theirs.keys(), key=mine.__getitem__)
        if alone:
            named = ", ".join(map(repr, alone[:_NAMED]))
            more = f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
            said.append(f"only {name} has the tokens {named}{more}")
    return f"{other}: {'; '.join(said)}"


@dataclass(frozen=True)
class Alignment:
    """A family under one tokenizer.

    rows: of every aligned embedding and head. places: parent -> for each row, the row of its own
    with the same token, -1 where it has none or the row belongs to no token. used: rows that
    belong to a token. base: whose rows stand in for missing ones. owner: whose row count is kept,
    and whose rows are those without a token.
    """

    tokenizer: Any
    rows: int
    places: Mapping[str, torch.Tensor]
    used: torch.Tensor
    base: str | None
    owner: str
    own_rows: Mapping[str, int]

    def changes(self, model: str) -> bool:
        """Whether a parent's rows are not what they have to be already."""
        import torch

        place = self.places[model]
        same = bool((place[self.used] == torch.arange(self.rows)[self.used]).all())
        return self.own_rows[model] != self.rows or not same

    def aligned(self, model: str, tensor_of: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A parent's embedding or head in the new order, at the widest dtype of the family.

        tensor_of: the same tensor of each parent, of shape [its rows, ...].
        """
        import torch

        own = tensor_of(model)
        dtype = own.dtype
        for other in self.places:
            dtype = torch.promote_types(dtype, tensor_of(other).dtype)
        result = torch.zeros(self.rows, *own.shape[1:], dtype=dtype)
        place = self.places[model]
        known = place >= 0
        result[known] = own[place[known]].to(dtype)
        missing = (self.used & ~known).nonzero().reshape(-1)
        if len(missing):
            result[missing] = self._stand_ins(missing, tensor_of, dtype)
        empty = (~self.used).nonzero().reshape(-1)
        owner = tensor_of(self.owner)
        empty = empty[empty < len(owner)]
        result[empty] = owner[empty].to(dtype)
        return result

    def _stand_ins(
        self, rows: torch.Tensor, tensor_of: Callable[[str], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows for tokens that a parent lacks: the base's where it has them, else the mean of
        those that do (one of one is itself), else zeros."""
        import torch

        shape = tensor_of(self.owner).shape[1:]
        total = torch.zeros(len(rows), *shape, dtype=torch.float32)
        count = torch.zeros(len(rows), *[1] * len(shape))
        for model, place in self.places.items():
            there = place[rows] >= 0
            total[there] += tensor_of(model)[place[rows][there]].float()
            count[there] += 1
        mean = (total / count.clamp(min=1)).to(dtype)
        if self.base is not None:
            place = self.places[self.base][rows]
            mean[place >= 0] = tensor_of(self.base)[place[place >= 0]].to(dtype)
        return mean


def align(
    directories: Mapping[str, Path],
    own_rows: Mapping[str, int],
    source: str,
    base: str | None,
    *,
    trust_remote_code: bool = False,
) -> Alignment:
    """The alignment that ``tokenizer_source`` asks for.

    directories: parent -> where its tokenizer and config are, the first of them the base or the
        one in its place. own_rows: of their embeddings. source: "union", "base", a parent, or the
        directory of another tokenizer.

    Raises:
        ParentError: a tokenizer cannot be read, or mergekit cannot build the one asked for.
    """
    import torch
    from mergekit.common import ModelPath, ModelReference
    from mergekit.tokenizer.build import build_tokenizer

    first = base or next(iter(directories))
    references = {
        name: ModelReference(model=ModelPath(path=str(path))) for name, path in directories.items()
    }
    other = None if source in ("union", "base") else references.get(source)
    if source not in ("union", "base") and other is None:
        other = ModelReference(model=ModelPath(path=source))
    for name, path in directories.items():
        _refuse_without_tokenizer(name, path, trust_remote_code)
    try:
        with quiet_logs(logging.CRITICAL), redirect_stderr(io.StringIO()), _vocabularies_in_order():
            built = build_tokenizer(
                base_model=references[first],
                referenced_models=list(references.values()),
                tokenizer_source=other or source,
                trust_remote_code=trust_remote_code,
                add_tokens=[],
            )
    except Exception as error:  # mergekit and transformers raise what they like
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParentError(f"tokenizer_source {source!r}: it cannot be built: {reason}") from error
    owner = source if source in directories else first
    ids = built.tokenizer.get_vocab().values()
    kept = own_rows[owner] if source in ("union", "base") or source in directories else 0
    rows = max(kept, max(ids) + 1)
    used = torch.zeros(rows, dtype=torch.bool)
    used[torch.tensor(sorted(ids))] = True
    places = {}
    for name, reference in references.items():
        place = torch.full((rows,), -1, dtype=torch.int64)
        for new, old in built.permutations[reference].items():
            if old < own_rows[name]:  # a token beyond the rows that the model has is one it lacks
                place[new] = old
        places[name] = place
    return Alignment(built.tokenizer, rows, places, used, base, owner, dict(own_rows))


def _refuse_without_tokenizer(name: str, path: Path, trust_remote_code: bool) -> None:
    """mergekit takes such a model's vocabulary for the base's."""
    from transformers import AutoTokenizer

    try:
        with quiet_logs(logging.CRITICAL), redirect_stderr(io.StringIO()):
            AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises what its tokenizers raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParentError(
            f"{name}: tokenizer_source needs every parent's tokenizer, and this one's cannot be "
            f"read ({reason}); put its tokenizer files beside its weights"
        ) from error


@contextmanager
def _vocabularies_in_order() -> Iterator[None]:
    """mergekit numbers the tokens that a union adds as it meets them, and a tokenizer names its own
    in an order of chance: here by their numbers."""
    from transformers import PreTrainedTokenizerFast

    as_it_comes = PreTrainedTokenizerFast.get_vocab

    def in_order(tokenizer: Any) -> dict[str, int]:
        return dict(sorted(as_it_comes(tokenizer).items(), key=lambda item: item[1]))

    PreTrainedTokenizerFast.get_vocab = in_order
    try:
        yield
    finally:
        PreTrainedTokenizerFast.get_vocab = as_it_comes
