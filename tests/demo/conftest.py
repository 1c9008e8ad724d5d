"""The demo family, trained once a session."""

from __future__ import annotations

import pytest

from agentmerge.demo import Family, cached_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return cached_family(("shift", "sort"), 0, tmp_path_factory.mktemp("families"))
