"""A search advised by a real model behind a real server: only where one is named.

    AGENTMERGE_TEST_BASE_URL=http://localhost:8000/v1 AGENTMERGE_TEST_MODEL=name \\
        python -m pytest tests/agents/test_real_model.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentmerge import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.session import driving

URL = os.environ.get("AGENTMERGE_TEST_BASE_URL")


@pytest.mark.skipif(URL is None, reason="opt-in: set AGENTMERGE_TEST_BASE_URL and ..._MODEL")
def test_a_real_model_gives_advice_that_is_used(tmp_path: Path, fake_config: str, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", "none"))
    model = os.environ.get("AGENTMERGE_TEST_MODEL", "local")
    agents = f"agents: {{llm: 'openai:{model}', base_url: '{URL}', timeout_s: 300}}\n"
    config = SearchConfig.from_text(fake_config.replace("cma_es", "llm_evo") + agents)
    row = driving.run(config, name="real", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        advice, summary = ledger.advice(row.id), run_summary(ledger, row)
    assert row.status == "done"
    assert summary["agents"]["tokens_out"] > 0
    assert any(word["guidance"]["source"] == "model" for word in advice)
