"""Merges, proofs, parents and gradients on the devices that there are, against the CPU.

On a machine without a GPU these run on the CPU alone, where loops are held against kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmerge.cli.app import run_app
from agentmerge.errors import UserError
from agentmerge.merging.family import Family
from agentmerge.merging.placement import PLACEMENTS, Placement
from agentmerge.recipe import Recipe
from agentmerge.session import selftest
from tests.merging.merge_cases import LAYERS, METHODS, recipes

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def test_every_trial_of_the_self_test(device: str) -> None:
    found = selftest.try_device(device)
    assert len(found) == 5
    assert all(finding.ok for finding in found), found


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_family_merges_the_same_wherever_its_parents_are(
    family_of: Callable[..., dict[str, Path]], device: str, placement: Placement
) -> None:
    """Bit for bit, except where sums over a tensor are in another order."""
    paths = family_of(dtype=torch.bfloat16)
    here = Family.open(paths, base="base")
    there = Family.open(paths, base="base", device=device, placement=placement)
    for method in METHODS:
        asked = Recipe.parse(recipes(method)["smooth"]).canonical(LAYERS)
        for (name, want), (_, found) in zip(here.merge(asked), there.merge(asked), strict=True):
            assert str(found.device) == device
            torch.testing.assert_close(found.cpu(), want, msg=f"{method} {name}")


def test_a_device_that_errs_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One wrong bit of one method, and a driver that raises: said, and what is left named."""
    merge_tensor = selftest.merge_tensor

    def errs(method: str, *args: Any) -> bool:
        found = merge_tensor(method, *args)
        if method == "ties":
            args[3].view(torch.uint8)[0, 0] ^= 1
        return found

    def breaks(tensor: torch.Tensor) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(selftest, "merge_tensor", errs)
    monkeypatch.setattr(selftest, "checksum", breaks)
    monkeypatch.setattr(selftest, "_DTYPES", (torch.bfloat16,))
    found = {finding.what: finding for finding in selftest.try_device("cpu")}
    assert [what for what, finding in found.items() if not finding.ok] == ["merging", "digests"]
    assert found["merging"].detail == "ties of torch.bfloat16 differs"
    assert "illegal memory access" in found["digests"].detail
    assert run_app(["doctor", "--selftest", "--runs-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "NOT cpu, trusted: resident parents, gradients of merges, answers" in said
    assert "merging, digests cannot be trusted" in said


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no 'cuda:9' here; there are cpu"):
        selftest.try_device("cuda:9")
