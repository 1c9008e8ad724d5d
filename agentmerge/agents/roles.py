"""Which model speaks for which role, from the config or ready-made, with what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agentmerge.agents.models import ASSUMED_MAX_TOKENS, AgentModel
from agentmerge.agents.prices import price_of
from agentmerge.agents.providers import resolve_model, split_spec
from agentmerge.config import ROLES, Role, RoleSettings, SearchConfig
from agentmerge.contracts.operators import CURATOR
from agentmerge.errors import UserError
from agentmerge.system.redaction import revealed


def models_for(
    config: SearchConfig, ready: Mapping[Role, Any]
) -> Iterator[tuple[Role, AgentModel]]:
    """Each role with its model; roles without one are left out, and the curator where no pool is
    to be chosen from. Equal settings share a model.

    ready: chat models by role, instead of what the config names.

    Raises:
        UserError: a model that cannot be had, or a cost limit where a price is unknown.
    """
    shared: dict[str, AgentModel] = {}
    for role in ROLES:
        if role == CURATOR and not config.curated:
            continue
        own = config.agents.settings_for(role)
        if ready.get(role) is not None:
            yield role, model_for(config, own, "", f"the {role}", ready[role])
            continue
        if own.model is None or own.model == "none":
            continue
        key = own.model_dump_json()
        if key not in shared:
            shared[key] = model_for(config, own, own.model, f"the {role}")
        yield role, shared[key]


def model_for(
    config: SearchConfig, own: RoleSettings, name: str, whose: str, ready: Any = None
) -> AgentModel:
    """The model of these settings. whose: in words. ready: a chat model in its place.

    Raises:
        UserError: it cannot be had, or there is a cost limit and its price is unknown.
    """
    own = _limited(config, own)
    if ready is not None:
        return _around(config, own, ready, _name(ready), ready=True)
    chat = resolve_model(
        name,
        base_url=revealed(own.base_url, f"the base_url of {whose}"),
        temperature=own.temperature,
        timeout_s=own.timeout_s or 60.0,
        max_tokens=own.max_tokens,
        key_file=config.agents.key_file,
        api_key_env=own.api_key_env,
    )
    return _around(config, own, chat, name)


def _limited(config: SearchConfig, own: RoleSettings) -> RoleSettings:
    """A budget that reserves what a reply may cost must be able to hold the reply to it."""
    budget = config.budget
    bound = budget.max_tokens is not None or budget.max_cost_usd is not None
    if not bound or own.max_tokens is not None:
        return own
    return own.model_copy(update={"max_tokens": ASSUMED_MAX_TOKENS})


def _around(
    config: SearchConfig, own: RoleSettings, chat: Any, name: str, ready: bool = False
) -> AgentModel:
    if ready:
        provider, model, server = "", name, "its own"
    else:
        provider, model, server = split_spec(name, own.base_url)  # type: ignore[assignment]
    price = price_of(provider, model, server is not None, config.budget.prices or {})
    if price is None and config.budget.max_cost_usd is not None:
        raise UserError(
            f"budget.max_cost_usd needs the price of {name}, which is not known: set budget.prices "
            f"to {{{model!r}: [dollars a million tokens in, out]}}"
        )
    return AgentModel(
        chat,
        timeout_s=own.timeout_s or 60.0,
        max_retries=own.max_retries or 0,
        max_tokens=own.max_tokens,
        price=price,
    )


def _name(chat: Any) -> str:
    return str(getattr(chat, "model_name", None) or getattr(chat, "model", None) or chat._llm_type)
