"""A real model family small enough to train in a minute, and lm-eval tasks that score it.

``family`` trains the checkpoints, ``tasks`` writes the tasks and a config over both, ``language``
says what a line looks like. Importing this package loads no torch.
"""

from agentmerge.demo.family import TinyFamily, cached_family, make_family
from agentmerge.demo.tasks import demo_config, write_skill_tasks, write_tasks

__all__ = [
    "TinyFamily",
    "cached_family",
    "demo_config",
    "make_family",
    "write_skill_tasks",
    "write_tasks",
]
