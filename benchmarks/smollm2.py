"""SmolLM2 families as benchmark problems: 135 million parameters, 15 dimensions, three skills.

A candidate is merged by the product's own kernels and asked by teacher-forced passes in bfloat16,
in which every distinct prefix is computed once. Sums and lists are right exactly where greedy
decoding says every token of the answer and then ends the line, so nothing is generated; a review's
code is the likeliest of three. Each seed asks other items, 100 a skill to search on and 200 sealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmerge.config import SearchConfig
from agentmerge.contracts.strategy import Items
from agentmerge.merging.family import Family
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.prefixes import NO_TOKEN, Rows, answer_logits
from agentmerge.testing.problem import KeptAnswers, Shown
from benchmarks.smollm2_family import CONFIG, INTERFERING, PLAIN, cached_family
from benchmarks.smollm2_items import CODES, N_ITEMS, SEARCH_LIMIT, SKILLS, Item, items

FAMILIES = {"smollm2-plain": PLAIN, "smollm2-interfering": INTERFERING}
#: Items that are asked at once: logits take 200 kB a token.
TOGETHER = 100


@dataclass(frozen=True)
class Sheet:
    """Items of one skill, ready to be asked. choices: a row each of the gold's codes, where the
    skill is a choice; codes: (items,), which one is right. ends: tokens that end a line."""

    rows: Rows
    codes: torch.Tensor | None
    ends: torch.Tensor

    def read(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(right, margin) of each item: the least over an answer's tokens, its end not among them;
        of a choice, the gold code's log-likelihood less the best other one's. In nats."""
        logits, rows = logits.float(), self.rows
        asked, gold = rows.gold != NO_TOKEN, rows.gold.clamp(min=0)
        if self.codes is not None:
            said = logits.log_softmax(-1).gather(-1, gold[..., None]).squeeze(-1)
            likely = (said * asked).sum(-1).view(-1, len(CODES))
            own = likely.gather(-1, self.codes[:, None])
            others = likely.scatter(-1, self.codes[:, None], -torch.inf).amax(-1)
            margin = own.squeeze(-1) - others
            return margin > 0, margin
        last = asked.sum(-1, keepdim=True) - 1
        letters = asked.scatter(-1, last, False)
        said = logits.argmax(-1)
        ended = torch.isin(said.gather(-1, last).squeeze(-1), self.ends)
        right = ((said == gold) | ~letters).all(-1) & ended
        own = logits.gather(-1, gold[..., None])
        others = logits.scatter(-1, gold[..., None], -torch.inf).amax(-1)
        return right, (own.squeeze(-1) - others).masked_fill(~letters, torch.inf).amin(-1)


@dataclass
class SmolLM2Problem(KeptAnswers):
    """See ``agentmerge.testing.problem.Problem``. limit: search items a skill."""

    name: str
    seed: int
    limit: int = SEARCH_LIMIT
    tasks: tuple[str, ...] = SKILLS
    _known: dict[tuple[float, ...], Shown] = field(default_factory=dict, repr=False)
    _confirmed: dict[tuple[float, ...], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self._family, self._config, self.space = _opened(self.name)
        self._search, self._sealed = sheets(_tokenizer(self.name), self.seed, self.limit)
        count = self.limit * len(SKILLS)
        task = np.repeat(np.arange(len(SKILLS)), self.limit)
        self._items = Items(task, np.full(count, 1 / count), np.ones(count, bool))

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        key = tuple(float(x) for x in vector)
        if key not in self._confirmed:
            values, _ = self._ask(key, self._sealed)
            self._confirmed[key] = values / len(values)
        return self._confirmed[key]

    @torch.no_grad()
    def _ask(self, vector: Sequence[float], asked: Sequence[Sheet]) -> tuple[Any, Any]:
        """(right, margin) of each item."""
        weights = dict(self._family.merge(self.space.recipe(vector)))
        found = [s.read(answer_logits(weights, self._config, s.rows)) for s in asked]
        return tuple(torch.cat(part).double().numpy() for part in zip(*found, strict=True))


def sheets(tokenizer: Any, seed: int, limit: int = SEARCH_LIMIT) -> tuple[list[Sheet], list[Sheet]]:
    """Search and sealed items of a seed, in the order that ``write_tasks`` gives them."""
    search: list[Sheet] = []
    sealed: list[Sheet] = []
    ends = torch.tensor(_ends(tokenizer))
    for place, skill in enumerate(SKILLS):
        pool = items(skill, held_out=True)
        order = np.random.default_rng([seed, place]).permutation(len(pool))[:N_ITEMS]
        search.append(_sheet(tokenizer, [pool[i] for i in order[:limit]], ends))
        for start in range(SEARCH_LIMIT, N_ITEMS, TOGETHER):
            part = [pool[i] for i in order[start : start + TOGETHER]]
            sealed.append(_sheet(tokenizer, part, ends))
    return search, sealed


def _sheet(tokenizer: Any, asked: Sequence[Item], ends: torch.Tensor) -> Sheet:
    codes = list(CODES.values())
    choice = asked[0].answer in codes
    rows, golds = [], []
    for item in asked:
        prompt = tokenizer(item.prompt)["input_ids"]
        for answer in codes if choice else [item.answer]:
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows.append(prompt + (tokens[:-1] if choice else tokens))
            golds.append(tokens if choice else [*tokens, tokenizer.eos_token_id])
    right = torch.tensor([codes.index(item.answer) for item in asked]) if choice else None
    return Sheet(Rows.of(rows, golds), right, ends)


def _ends(tokenizer: Any) -> list[int]:
    """Tokens after which a generated answer is over: the text's end, and all that begin a line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [tokenizer.eos_token_id, *(i for i, text in enumerate(texts) if text[:1] == "\n")]


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(cached_family(FAMILIES[name]) / "base")


@lru_cache(maxsize=1)
def _opened(name: str) -> tuple[Family, Any, SearchSpace]:
    from transformers import AutoConfig

    config = SearchConfig.from_file(cached_family(FAMILIES[name]) / CONFIG)
    genome = config.genome
    paths = {model: Path(model) for model in (genome.base_model or "", *genome.models)}
    family = Family.open(paths, base=genome.base_model)
    dtype = config.worker.dtype or family.layout.dtype
    space = SearchSpace(genome, family.layout.num_layers, dtype)
    return family, AutoConfig.from_pretrained(genome.base_model or ""), space
