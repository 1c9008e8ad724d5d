"""The contract of a worker, where plugins of version 0.1 import it."""

from agentmerge.contracts.worker import *  # noqa: F403
