"""What an option's reference stands for reaches a worker whose environment lacks it."""

from __future__ import annotations

import pytest

from agentmerge.system import redaction
from agentmerge.system.redaction import redacted, remember, remembered, revealed


def test_a_reference_means_what_it_means_where_the_search_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redaction, "_named", {})
    monkeypatch.setenv("OWN_TOKEN", "canary-71b2c0")
    options = {"nested": [{"token": "${OWN_TOKEN}"}], "none": "${NOT_SET}"}
    sent = remembered(options)
    assert sent == {"OWN_TOKEN": "canary-71b2c0"}
    monkeypatch.delenv("OWN_TOKEN")  # as on another machine
    remember(sent)
    assert revealed(options["nested"], "worker.options") == [{"token": "canary-71b2c0"}]
    assert "canary-71b2c0" not in str(redacted({"text": "it is canary-71b2c0"}))
