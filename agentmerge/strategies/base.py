"""The contract of a strategy, where plugins of version 0.1 import it."""

from agentmerge.contracts.operators import *  # noqa: F403
from agentmerge.contracts.strategy import *  # noqa: F403
