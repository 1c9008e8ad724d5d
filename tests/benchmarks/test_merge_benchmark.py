"""``python -m benchmarks.merge --quick`` runs, and writes what docs/performance.md is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentmerge.parents.headers import read_config
from agentmerge.parents.layout import read_layout

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_says_all_it_should(tmp_path: Path) -> None:
    target = tmp_path / "merge.json"
    command = [sys.executable, "-m", "benchmarks.merge", "--quick", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mergekit" in done.stdout
    result = json.loads(target.read_text())
    assert result["machine"]["threads"] == 1
    assert result["copy_s"] > 0
    for method in ("linear", "slerp", "task_arithmetic", "ties", "dare_ties"):
        row = result["methods"][method]
        assert min(row[key] for key in ("first_s", "seconds", "load_s", "mergekit_s")) > 0
        assert row["faster"] == pytest.approx(row["mergekit_s"] / row["seconds"])
        assert row["over_floor"] == pytest.approx(row["seconds"] / row["floor_s"])
    for table, length in (("parameters", 2), ("experts", 2), ("groups", 2)):
        assert len(result[table]) == length
        assert all(row["ties"] > 0 for row in result[table])


def test_the_families_are_about_as_large_as_asked(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.families import Shape, recipe, write_family
    finally:
        sys.path.remove(str(ROOT))
    import torch

    from agentmerge.merging.plan import plan
    from agentmerge.recipe import Recipe

    for asked in (1_000_000, 10_000_000, 115_600_000, 500_000_000):
        shapes = Shape.near(asked).tensors.values()
        assert sum(torch.Size(shape).numel() for shape in shapes) == pytest.approx(asked, rel=0.2)
    paths = write_family(tmp_path, Shape.near(200_000), 2, torch.bfloat16)
    layout = read_layout(paths, "base")
    assert layout.tied
    assert read_config(paths["base"])["num_hidden_layers"] == layout.num_layers == 10
    draw = torch.Generator().manual_seed(0)
    for method in ("linear", "slerp", "ties", "della"):
        made = Recipe.parse(recipe(method, list(paths), 5, draw)).canonical(10)
        assert len(plan(made, layout).tensors) == len(layout.tensors)
