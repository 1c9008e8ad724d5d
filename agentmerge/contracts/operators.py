"""Who made a candidate: the names that the ledger has for it, and what follows from them."""

from __future__ import annotations

from typing import Final

#: Of generation 0: each parent alone, and the cheap merges that need no search.
PARENT, UNIFORM, SCALE, DEPTH = "parent", "uniform", "scale", "depth"
#: Where layers are searched: those of two experts, and a model with its middle once more.
SANDWICH, STACK = "sandwich", "stack"
#: With the parents, all that a searched merge has to beat.
RIVALS = (UNIFORM, SCALE, DEPTH, SANDWICH, STACK)
CHEAP = frozenset((PARENT, *RIVALS))
#: A warm start (``search.init``).
INIT = "init"
#: The best of the search that a branch goes on from, scored again.
INCUMBENT = "incumbent"
#: Whole candidates that an agent asked for, as a strategy takes them up.
ADVICE = "agent"
#: What an agent, or whoever drives the toolkit, tried by a tool.
PROBE = "probe"
#: What was drawn around an advised mean.
LLM_EVO = "llm_evo"
#: What a new search space begins with; also whose word it is that one was opened, or why not.
STRUCTURE = "structure"
#: Whose word it is which experts of a pool are worth trying.
CURATOR: Final = "curator"
#: Of the arm that hears no model (``agentmerge.search.past``).
SHADOW = "shadow"
#: Of the end: the best stack of layers without its weakest ones (``agentmerge.search.depths``).
SHALLOWER = "shallower"
#: For whoever works in one search space: of what was made in another.
CARRIED = "carried"
#: Of candidates that take no turn of a search space.
NO_TURN = (SHADOW, PROBE, SHALLOWER)
