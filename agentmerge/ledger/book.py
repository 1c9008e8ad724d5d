"""One run's candidates and words in memory: read once, written through.

A search asks for all of its past several times a generation, and to decode it each time cost more
than the search. Nobody else writes a run whose lease is held, so what was read stays true; what is
written goes to the ledger first, and the rows that it changed are read back. Reading commands,
which hold no lease, ask the ledger.
"""

from __future__ import annotations

import json
import math
import threading
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from agentmerge.contracts.strategy import Observation, Proposal
from agentmerge.errors import NotFound
from agentmerge.ledger import Candidate, Ledger, evaluations, incumbent

Place = tuple[int, int]


class Book:
    """Answers as the ledger does for one run; safe to share between threads.

    It is read when it is first asked, so whatever a run begins with has to be written before.
    """

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self._ledger, self._run_id = ledger, run_id
        self._lock = threading.RLock()
        self._read = False
        self._places: list[Place] = []
        self._rows: list[Candidate] = []
        self._history: list[Observation | None] = []
        self._used: list[float] = []
        self._promised: list[float] = []
        self._sums: dict[tuple[int | None, bool], float] = {}
        #: The best, where it is known; what is still open.
        self._best: Candidate | None = None
        self._best_is_known = True
        self._still_open: dict[Place, Candidate] = {}
        #: Grows with every change of a candidate: what was worked out of them holds until then.
        self.changes = 0
        self._twins: dict[Place, list[Place]] = defaultdict(list)
        self._words: dict[str, dict[int, dict[str, Any]]] = {}
        self._wanted: dict[tuple[str, Callable[..., bool]], list[dict[str, Any]]] = {}
        self._probed: dict[int | None, dict[str, int]] = {}

    # --- candidates -------------------------------------------------------------------------

    def candidates(
        self, generation: int | None = None, up_to: int | None = None
    ) -> list[Candidate]:
        """Candidates ordered by (generation, slot); a twin carries its first one's result."""
        with self._open():
            if generation is not None:
                return self._rows[self._before(generation) : self._before(generation + 1)]
            return self._rows[: None if up_to is None else self._before(up_to + 1)]

    def find(self, generation: int, slot: int) -> Candidate | None:
        with self._open():
            at = bisect_left(self._places, (generation, slot))
            found = self._places[at : at + 1] == [(generation, slot)]
            return self._rows[at] if found else None

    def candidate(self, generation: int, slot: int) -> Candidate:
        found = self.find(generation, slot)
        if found is None:
            raise NotFound(f"no candidate {generation}.{slot} in this run")
        return found

    def history(self, up_to: int | None = None) -> list[Observation]:
        """Everything that was scored, stopped or failed, ordered by (generation, slot)."""
        with self._open():
            end = None if up_to is None else self._before(up_to + 1)
            return [o for o in self._history[:end] if o is not None]

    def evaluations(self, up_to: int | None = None, *, promised: bool = False) -> float:
        """As ``rows.evaluations``; promised: with what is open, as if it were done."""
        with self._open():
            if (up_to, promised) not in self._sums:
                end = None if up_to is None else self._before(up_to + 1)
                parts = self._used[:end] + (self._promised[:end] if promised else [])
                self._sums[up_to, promised] = math.fsum(parts)
            return self._sums[up_to, promised]

    def pending(self, up_to: int) -> list[Candidate]:
        """What is still to be scored, up to a generation."""
        with self._open():
            return [c for at, c in sorted(self._still_open.items()) if at[0] <= up_to]

    def incumbent(self) -> Candidate | None:
        """As ``rows.incumbent`` of all."""
        with self._open():
            if not self._best_is_known:
                self._best, self._best_is_known = incumbent(self._rows), True
            return self._best

    def add_candidates(
        self,
        generation: int,
        proposals: Sequence[tuple[Proposal, str, str, str]],
        first_slot: int = 0,
    ) -> None:
        """As ``Ledger.add_candidates``."""
        self._ledger.add_candidates(self._run_id, generation, proposals, first_slot)
        self._read_back((generation, first_slot + n) for n in range(len(proposals)))

    def save_evaluation(self, place: Place, *, score: float | None, **paid: Any) -> None:
        """As ``Ledger.save_evaluation``."""
        self._ledger.save_evaluation(self._run_id, place, score=score, **paid)
        with self._open():
            self._read_back([place, *self._twins.get(place, ())])

    def save_violations(self, found: Mapping[Place, float]) -> None:
        """What candidates, by (generation, slot), lack to their constraints."""
        with self._open():
            changed = {
                at: value for at, value in found.items() if self.candidate(*at).violation != value
            }
            if changed:
                self._ledger.save_violations(self._run_id, changed)
                twins = [twin for at in changed for twin in self._twins.get(at, ())]
                self._read_back(dict.fromkeys([*changed, *twins]))

    # --- words ------------------------------------------------------------------------------

    def advice(
        self, generation: int | None = None, role: str | None = None
    ) -> list[dict[str, Any]]:
        """Every agent's word, ordered by (generation, role): {generation, role, ...body}."""
        with self._open():
            found = []
            for name in sorted(self._words) if role is None else [role]:
                by = self._words.get(name, {})
                found += [
                    by[at]
                    for at in (sorted(by) if generation is None else [generation])
                    if at in by
                ]
            return sorted(found, key=lambda w: w["generation"]) if role is None else found

    def words(self, role: str, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """A role's words that are ``wanted``, in order; each is looked at once."""
        with self._open():
            if (role, wanted) not in self._wanted:
                self._wanted[role, wanted] = [w for w in self.advice(role=role) if wanted(w)]
            return self._wanted[role, wanted]

    def save_advice(self, generation: int, role: str, body: Mapping[str, Any]) -> None:
        """The first word of a role on a generation stays."""
        self._ledger.save_advice(self._run_id, generation, role, body)
        with self._open():
            self._hear({"generation": generation, "role": role} | json.loads(json.dumps(body)))

    def probe_totals(self, up_to: int | None = None) -> dict[str, int]:
        """{calls, items}; up_to: of no later generation."""
        with self._lock:
            if up_to not in self._probed:
                self._probed[up_to] = self._ledger.probe_totals(self._run_id, up_to)
            return self._probed[up_to]

    def save_probe(self, *call: Any, **more: Any) -> None:
        """As ``Ledger.save_probe``."""
        with self._lock:
            self._probed.clear()
            self._ledger.save_probe(self._run_id, *call, **more)

    # --- what is read -----------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Under the lock, with everything read."""
        with self._lock:
            if not self._read:
                self._places, self._rows, self._history = [], [], []
                self._used, self._promised = [], []
                self._best, self._best_is_known = None, True
                self._still_open.clear()
                self._twins.clear()
                self._words.clear()
                self._wanted.clear()
                for word in self._ledger.advice(self._run_id):
                    self._hear(word)
                self._take(self._ledger.candidates(self._run_id))
                self._read = True
            yield

    def _before(self, generation: int) -> int:
        """How many candidates are of an earlier generation."""
        return bisect_left(self._places, (generation, -1))

    def _read_back(self, places: Iterable[Place]) -> None:
        """What the ledger holds of candidates by now; where it cannot be read, nothing is held."""
        with self._open():
            try:
                for generation, slot in places:
                    self._take(self._ledger.candidates(self._run_id, generation, slot=slot))
            except BaseException:
                self._read = False
                raise

    def _hear(self, word: dict[str, Any]) -> None:
        heard = self._words.setdefault(word["role"], {}).setdefault(word["generation"], word)
        for (role, wanted), found in self._wanted.items():
            if heard is word and role == word["role"] and wanted(word):
                insort(found, word, key=itemgetter("generation"))

    def _take(self, found: Sequence[Candidate]) -> None:
        for candidate in found:
            place = (candidate.generation, candidate.slot)
            observed = candidate.observation() if candidate.observed else None
            used = evaluations([candidate])
            promised = candidate.cost if candidate.state == "open" and not candidate.prior else 0.0
            at = bisect_left(self._places, place)
            self.changes += 1
            self._sums.clear()
            if self._best is not None and (self._best.generation, self._best.slot) == place:
                self._best_is_known = False  # it was the best with what it had
            elif self._best_is_known:
                self._best = incumbent([candidate, *([self._best] if self._best else [])])
            if candidate.state == "open" and not candidate.prior:
                self._still_open[place] = candidate
            else:
                self._still_open.pop(place, None)
            if self._places[at : at + 1] == [place]:
                self._rows[at], self._history[at] = candidate, observed
                self._used[at], self._promised[at] = used, promised
                continue
            self._places.insert(at, place)
            self._rows.insert(at, candidate)
            self._history.insert(at, observed)
            self._used.insert(at, used)
            self._promised.insert(at, promised)
            if candidate.twin is not None:
                self._twins[candidate.twin].append(place)
