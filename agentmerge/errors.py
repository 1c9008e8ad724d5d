"""Every exception agentmerge raises on purpose, drawn as one tree.

    AgentmergeError                 exit code 1
    ├── UserError                   exit code 2: the user can mend it
    │   ├── ConfigError             a config file or option (carries every fault found)
    │   ├── RecipeError             a merge recipe that cannot be read
    │   ├── ParentError             models that cannot be merged with each other
    │   ├── TaskError               a task that cannot be scored
    │   ├── PromptError             a prompt file with a missing or unknown variable
    │   ├── NotFound                a run, generation or candidate that does not exist
    │   └── LeaseHeld               another process works on this search
    ├── RunFailed                   a search that cannot go on
    │   ├── WorkerLost              a worker died twice over a candidate
    │   │   ├── NoRoom              nothing is free to start one on now
    │   │   └── NoWorker            none can be started, or all die: the machine, not the candidate
    │   └── LedgerError             the results database cannot be written
    ├── CandidateFailed             one bad candidate: recorded as data, never ends a run
    │   └── RecipeRejected          refused before any worker saw it
    ├── BudgetReached               the next step cannot be paid: the search ends with its best
    ├── ReplyMissing                a replay came to a question that nobody answered before
    ├── NotBegun                    the search was to stop, or out of time, before it was scored
    └── ModelReplyError             a chat model failed: costs a generation's advice

A message says what, which value, and what to do. It knows nothing of how messages are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AgentmergeError(Exception):
    """Base of everything raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(AgentmergeError):
    """Something the user gave is wrong and the user can mend it."""

    exit_code = 2


class ConfigError(UserError):
    """One or more faults in a config; ``faults`` holds one sentence each.

    readable: the config without the sections that are at fault, where the rest can be read, so
        that the faults of its models and tasks can be told with them.
    """

    def __init__(self, faults: str | Sequence[str], readable: Any = None) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.readable = readable
        super().__init__("\n".join(self.faults))


class RecipeError(UserError):
    """A merge recipe cannot be read."""


class ParentError(UserError):
    """The parents cannot be merged with each other."""


class TaskError(UserError):
    """A task cannot be loaded or scored."""


class PromptError(UserError):
    """A prompt file names a variable that does not exist, or leaves out one it needs."""


class NotFound(UserError):
    """A run, a generation or a candidate that does not exist."""


class LeaseHeld(UserError):
    """Another live process works on this search."""


class RunFailed(AgentmergeError):
    """The search cannot go on; what was saved stays saved."""


class WorkerLost(RunFailed):
    """A worker died while it held a candidate, and so did the next."""


class NoRoom(WorkerLost):
    """No device is free for a worker now; there may be one later."""


class NoWorker(WorkerLost):
    """No worker can be started, or candidate after candidate loses them."""


class LedgerError(RunFailed):
    """The results database cannot be read or written."""


class CandidateFailed(AgentmergeError):
    """A candidate that could not be merged or scored; becomes a recorded result."""


class AnswerRefused(CandidateFailed):
    """A task's own code made nothing of a candidate's answer; of a parent's answer that is the
    task's fault."""


class RecipeRejected(CandidateFailed):
    """A recipe refused by rule before any worker saw it; on the command line, a mistake."""

    exit_code = 2


class NotBegun(AgentmergeError):
    """A candidate's turn came after the search was told to stop, or the search's time was up while
    it ran; it stays open, and whoever goes on scores it."""


class BudgetReached(AgentmergeError):
    """The next step cannot be paid; ``limit`` names the budget ("tokens", "cost", ...)."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"the budget is used up: {limit}")
        self.limit = limit


class ReplyMissing(AgentmergeError):
    """A replay came to something that the run it follows never saw."""


class ModelReplyError(AgentmergeError):
    """A chat model failed or never gave a valid reply; ``tokens_in/out`` is what it cost.

    unanswered: its server said nothing to the question itself, neither a reply nor that it is none.
    """

    def __init__(
        self, message: str, *, tokens_in: int = 0, tokens_out: int = 0, unanswered: bool = False
    ) -> None:
        super().__init__(message)
        self.unanswered = unanswered
        self.tokens_in = tokens_in
        self.tokens_out = tokens_out
