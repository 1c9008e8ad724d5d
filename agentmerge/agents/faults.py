"""What a failed model call was, and whether another try may help.

Reads any provider's exceptions by what they have in common (a status, headers, a class name), so
that no client needs to be imported. What it says of them is safe to show and to store.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from agentmerge.agents.schemas import clean_text
from agentmerge.system.redaction import redact


class ServerFault(Exception):
    """What no server may do; its text goes on from the model's name, as a `reason` does."""


_SHAPE_REFUSED = frozenset({400, 415, 422, 501})
_TURNED_DOWN = frozenset({400, 413, 422})
_MAY_PASS = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
_LOST_CONNECTION = frozenset(
    {"APIConnectionError", "TransportError", "RequestException", "RetryError"}
)
_MAX_RETRY_AFTER_S = 30.0
_MAX_REASON = 200


def status_of(error: Exception) -> int | None:
    """The HTTP status, where there was one."""
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    if status is None:  # Google's clients call it code, and wrap the error that has it
        status = getattr(error, "code", None) or getattr(error.__cause__, "code", None)
    return int(status) if isinstance(status, int) and 100 <= status < 600 else None


def _is_lost_connection(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(names & _LOST_CONNECTION)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later; an exhausted quota never does."""
    if getattr(error, "code", None) == "insufficient_quota":
        return False
    status = status_of(error)
    return status in _MAY_PASS if status is not None else _is_lost_connection(error)


def ran_out_of_time(error: Exception) -> bool:
    """Whether an answer did not come in time; a server that took no connection is none of these."""
    if "ConnectTimeout" in (type(error).__name__, type(error.__cause__).__name__):
        return False
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def refuses(error: Exception, words: re.Pattern[str]) -> bool:
    """Whether a server refused a request for what these words name, whatever status it chose; one
    that says that the request was wrong and not why is taken to mean them."""
    return status_of(error) in _SHAPE_REFUSED or refuses_for(error, words)


def turns_down(error: Exception) -> bool:
    """Whether a server was there and would not answer this very request."""
    return status_of(error) in _TURNED_DOWN


def refuses_for(error: Exception, words: re.Pattern[str]) -> bool:
    """Whether a server refused a request and its words are these, whatever status it chose."""
    status = status_of(error)
    return status is not None and status not in (401, 403, 429) and bool(words.search(_said(error)))


def retry_after_s(error: Exception) -> float | None:
    """What the server asks for, capped; None where it does not say."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("retry-after")
    if asked is None:
        return None
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)


def reason(error: Exception) -> str:
    """The rest of a sentence that begins with the model's name."""
    if isinstance(error, ServerFault):
        return clean_text(redact(str(error)), _MAX_REASON)
    status, words = status_of(error), _said(error)
    said = f" ({clean_text(redact(words), _MAX_REASON)})" if words else ""
    if status in (401, 403):
        return (
            f"refused the key: HTTP {status}{said}; check the key's environment variable, and that "
            "the config names it beside its base_url (agents.api_key_env)"
        )
    if status is not None:
        return f"answered HTTP {status}{said}"
    if ran_out_of_time(error):
        return "did not answer in time"
    if _is_lost_connection(error):
        return f"could not be reached, or cut the connection ({type(error).__name__})"
    return f"gave an answer that is no chat completion ({type(error).__name__})"


def _said(error: Exception) -> str:
    """The server's own words, "" where it had none."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return said if isinstance(said, str) else ""
