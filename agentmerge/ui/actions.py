"""What a page may have done with a search, each beside the command line that does the same.

Knows command lines, and what the processes say that it started of them: a search that goes on from
a page is a program of its own, which does not end with the page's. Opens no search.
"""

from __future__ import annotations

import hmac
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, LeaseHeld, NotFound, RunFailed, UserError
from agentmerge.ledger import RunRow
from agentmerge.ledger.folder import CHECKPOINTS, opened
from agentmerge.ledger.lease import Lease
from agentmerge.report.summary import run_status
from agentmerge.search.state import WAITING
from agentmerge.system.bounded import refuse_odd_file

#: How long a page waits for what it started, in seconds, and between looks at it.
START_S, LOOK_S = 20.0, 0.1
#: What a started program says, in the folder of its search.
CONSOLE = "console.log"
#: Characters of it that a page is told, of its end.
_SAID = 4000

_NUMBER = r"\d{1,15}(\.\d{1,9})?"
#: What an option besides the limits may be.
_VALUES = {
    "answer": r"yes|no",
    "at": r"\d{1,9}",
    "as": r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}",
    "seed": r"\d{1,9}",
}
#: Action -> its options besides the limits; what has None here takes no limit either.
_OPTIONS: dict[str, tuple[str, ...] | None] = {
    "stop": None, "resume": ("answer",), "branch": ("at", "as", "seed"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Started:
    process: subprocess.Popen[bytes]
    log: Path
    begins: int

    def fault(self) -> AgentmergeError | None:
        """Why it ended, unless it goes on, is done or was stopped."""
        code = self.process.poll()
        if code in (None, 0, 130, 143):
            return None
        said = ""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(self.begins)
            said = log.read().decode(errors="replace")[-_SAID:]
        errors = [line[7:] for line in said.splitlines() if line.startswith("error: ")]
        text = "; ".join(errors) or f"it ended with exit code {code}; {self.log} has what it said"
        return UserError(text) if code == 2 else RunFailed(text)


class Actions:
    """limits: options of ``resume`` and ``branch`` -> the config keys that they raise.

    allowed: whoever has the ``token`` may act; else pages show command lines only.
    """

    def __init__(self, runs_dir: Path, limits: Mapping[str, str], allowed: bool = False) -> None:
        self.runs_dir, self.limits, self.allowed = runs_dir, limits, allowed
        self.token = secrets.token_urlsafe(24)
        self._started: dict[str, _Started] = {}
        self._lock = Lock()

    def has(self, token: str) -> bool:
        return self.allowed and hmac.compare_digest(token.encode(), self.token.encode())

    def offered(
        self, row: RunRow, status: str, config: SearchConfig, generation: int
    ) -> dict[str, Any]:
        """{allowed, fault, offers: [{action, label, what, command, given, options}]}.

        given: what the action is asked with; options: [{name, now}] that may be added.
        """
        limits = [{"name": n, "now": attrgetter(key)(config)} for n, key in self.limits.items()]
        offers = []
        if status == "running":
            offers.append(self._offer(row, "stop", "Stop", "what runs is finished and saved first"))
        elif status == WAITING:
            for answer in ("yes", "no"):
                label, what = f"Answer {answer}", row.stop_reason
                offers.append(self._offer(row, "resume", label, what, {"answer": answer}))
        else:
            what = "limits may be raised"
            offers.append(self._offer(row, "resume", "Go on", what, options=limits))
        if generation >= 0:
            what = "a new search with the past of this one, up to a generation"
            given = {"at": str(generation), "as": f"{row.name[:70]}-b{generation}"}
            more = [{"name": "seed", "now": row.seed}, *limits]
            offers.append(self._offer(row, "branch", "Branch", what, given, more))
        started = self._started.get(row.name)
        fault = started and started.fault()
        return {"allowed": self.allowed, "fault": str(fault or ""), "offers": offers}

    def _offer(
        self,
        row: RunRow,
        action: str,
        label: str,
        what: str,
        given: Mapping[str, str] | None = None,
        options: Any = (),
    ) -> dict[str, Any]:
        given = given or {}
        return {
            "action": action,
            "label": label,
            "what": what,
            "command": command(self._arguments(row.name, action, {})),
            "given": dict(given),
            "options": list(options),
        }

    def act(self, name: str, action: str, given: Mapping[str, Any]) -> dict[str, str]:
        """Do it, and wait a while for how it goes: {command, said}.

        Raises:
            NotFound: no such search or action. LeaseHeld: it runs already.
            UserError, RunFailed: what the command line said.
        """
        if action not in _OPTIONS:
            raise NotFound(f"there is no action {action[:40]!r}; there are: {', '.join(_OPTIONS)}")
        with opened(self.runs_dir) as ledger:
            row = ledger.run(name)
            status = run_status(ledger, row)
        given = self._read(action, given)
        arguments = self._arguments(row.name, action, given)
        if action == "stop":
            found = Lease.ask_to_stop(self.runs_dir / CHECKPOINTS, row.id, row.name)
            said = f"process {found.pid} on {found.host} finishes what it is at, saves and stops"
            return {"command": command(arguments), "said": said}
        if action == "branch" and "at" not in given:
            raise UserError("at, the generation to start from, is missing")
        driven = row.name
        if action == "branch":
            driven = given.get("as") or f"{row.name}-b{given['at']}"
        elif status == "running":
            raise LeaseHeld(f"search {row.name!r} runs already; stop it first to raise a limit")
        elif given.get("answer") and status != WAITING:
            raise UserError(f"search {row.name!r} asks nothing: leave the answer out")
        return {"command": command(arguments), "said": self._awaited(driven, arguments)}

    def _read(self, action: str, given: Mapping[str, Any]) -> dict[str, str]:
        """What was given, as text that no shell and no option parser takes for anything else."""
        own = _OPTIONS[action]
        known = {} if own is None else dict.fromkeys(self.limits, _NUMBER)
        known |= {name: _VALUES[name] for name in own or ()}
        found = {}
        for name, value in given.items():
            if name not in known:
                raise UserError(f"{action} has no option {str(name)[:40]!r} here")
            text = str(value).strip()
            if text and not re.fullmatch(known[name], text, re.ASCII):
                raise UserError(f"{name} cannot be {text[:80]!r}")
            if text:
                found[name] = str(int(text)) if name == "at" else text
        return found

    def _arguments(self, name: str, action: str, given: Mapping[str, str]) -> list[str]:
        where = [] if self.runs_dir == Path("runs") else ["--runs-dir", str(self.runs_dir)]
        options = [word for key, value in given.items() for word in (f"--{key}", value)]
        return [action, name, *where, *options]

    def _awaited(self, name: str, arguments: list[str]) -> str:
        """Start it, and see whether it begins."""
        with self._lock:
            before = self._started.get(name)
            if before is not None and before.process.poll() is None:
                raise LeaseHeld(
                    f"search {name!r} is driven by process {before.process.pid} already"
                )
            started = self._started[name] = self._start(name, arguments)
        until = time.monotonic() + START_S
        pid = started.process.pid
        while time.monotonic() < until:
            if fault := started.fault():
                self._forget(name, started)
                raise fault
            if started.process.poll() is not None:
                return "it is over"
            with suppress(AgentmergeError), opened(self.runs_dir) as ledger:
                holder = Lease.holder(self.runs_dir / CHECKPOINTS, ledger.run(name).id)
                if holder is not None and holder.pid == pid:
                    return f"process {pid} drives {name}; {started.log} has what it says"
            time.sleep(LOOK_S)
        return f"process {pid} looks at its models and tasks; {started.log} has what it says"

    def _start(self, name: str, arguments: list[str]) -> _Started:
        """In a session of its own, so that it ends neither with this program nor with Ctrl-C."""
        folder = self.runs_dir / name
        path = folder / CONSOLE
        refuse_odd_file(path, UserError)
        try:
            folder.mkdir(exist_ok=True)
            with path.open("ab") as log:
                log.write(f"$ {command(arguments)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "agentmerge", *arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
                return _Started(process, path, log.tell())
        except OSError as error:
            raise RunFailed(f"{path} cannot be written: {error.strerror}") from None

    def _forget(self, name: str, started: _Started) -> None:
        """Its page is told at once; and what was no search leaves no folder."""
        self._started.pop(name, None)
        with suppress(AgentmergeError), opened(self.runs_dir) as ledger:
            if all(row.name != name for row in ledger.runs()):
                with suppress(OSError):
                    started.log.unlink()
                    started.log.parent.rmdir()


def command(arguments: list[str]) -> str:
    """As a user types it."""
    return shlex.join(["agentmerge", *arguments])
