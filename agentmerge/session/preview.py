"""What a prompt says to a model at a point of a real search, without asking one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmerge.agents.prompts import load_prompts, prompt_hash, prompt_of
from agentmerge.agents.replies import digit_by_digit
from agentmerge.config import ROLES, SearchConfig
from agentmerge.contracts.operators import CURATOR
from agentmerge.errors import NotFound
from agentmerge.ledger.folder import existing_runs, opened
from agentmerge.preflight.prepare import prepare
from agentmerge.search import curating
from agentmerge.search.advise import question
from agentmerge.session.opening import opened_search


def preview(
    run: str,
    name: str,
    *,
    generation: int | None = None,
    prompts: Path | str | None = None,
    runs_dir: Path | str = "runs",
) -> dict[str, Any]:
    """{messages, generation, tokens, tokens_measured}.

    tokens: an estimate, for a tokenizer with a token a digit. tokens_measured: what this very
    question took when the search asked it, None where it did not.

    Raises:
        NotFound: no such run or generation. PromptError: no such prompt, or a bad one.
    """
    prompt_of(load_prompts(prompts), name)
    role = next(role for role in ROLES if role == name)
    folder = existing_runs(runs_dir)
    with opened(folder) as ledger:
        row = ledger.run(run)
        known = sorted({c.generation for c in ledger.candidates(row.id) if c.state != "open"})
        words = ledger.advice(row.id, role=CURATOR) if role == CURATOR else []
    last = words[0]["generation"] if words else known[-1] if known else 0
    at = last if generation is None else generation
    if at not in known:
        raise NotFound(f"run {row.name!r} has no generation {at}")
    overrides = {} if prompts is None else {"agents.prompts": str(Path(prompts).absolute())}
    config = SearchConfig.from_text(row.config, row.name, overrides)
    prepared = prepare(config, allow_benchmarks=True, weights=False)
    # The past is read, and no model: whose answers it holds, the run says itself.
    prepared = replace(prepared, identities=row.facts["identities"])
    past = opened_search(folder, lambda _: (prepared, row), advised=False, read_only=True)
    with past as (search, _, _):
        if role == CURATOR:
            messages, _ = curating.question(search, at)
        else:
            messages, _, _ = question(search, role, at)
        asked = search.ledger.call(row.id, at, name, prompt_hash(messages))
    return {
        "messages": messages,
        "generation": at,
        "tokens": digit_by_digit(messages),
        "tokens_measured": asked.tokens_in if asked and asked.tokens_in else None,
    }
