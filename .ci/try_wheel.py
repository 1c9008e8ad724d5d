"""Tries an installed wheel: its prompts and graphs are inside it, and a search on it ends.

Run by `make wheel` with the interpreter the wheel is installed for, from outside the checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import agentmerge
from agentmerge import load_graph
from agentmerge.agents.prompts import load_prompts
from agentmerge.system.bundled import bundled

CONFIG = """\
genome:
  models: [one, two]
  base_model: base
  merge_method: task_arithmetic
tasks: [a, b]
worker: {kind: fake}
budget: {max_evaluations: 12}
"""

home = Path(agentmerge.__file__).parent
assert home.is_relative_to(sys.prefix), f"agentmerge comes from {home}, not from the wheel"
for found in map(bundled, ("prompts", "graphs")):
    assert found.is_relative_to(home), f"{found} is not inside the wheel"
assert version("agentmerge") == agentmerge.__version__
assert (home / "py.typed").is_file()
load_prompts()
load_graph("search")

program = str(Path(sys.executable).parent / "agentmerge")
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "config.yml").write_text(CONFIG)
    for line in ("check config.yml", "run config.yml --name try -q", "best try", "show try"):
        subprocess.run([program, *line.split()], cwd=folder, check=True)
print("the wheel works: its prompts and graphs are inside it")
