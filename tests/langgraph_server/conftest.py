"""A real ``langgraph dev`` on loopback; it is installed into an environment of its own
(.ci/langgraph-server), once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.system.temporary import cache_dir
from tests.session.conftest import BODY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def langgraph() -> Path:
    """The ``langgraph`` program."""
    home = cache_dir() / "langgraph-server"
    script = [ROOT / ".ci/langgraph-server", sys.executable, home]
    subprocess.run([str(part) for part in script], check=True, timeout=600)
    return home / "bin" / "langgraph"


def environment(runs_dir: Path) -> dict[str, str]:
    own = {
        "AGENTMERGE_RUNS_DIR": str(runs_dir),
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_DISABLE_FILE_PERSISTENCE": "true",  # of threads and runs, in this checkout
        "PYTHONPATH": str(ROOT),
        "AGENTMERGE_SERVER_CONFIG": str(runs_dir.parent / "server.yml"),
    }
    return {name: value for name, value in os.environ.items() if "API_KEY" not in name} | own


@contextmanager
def serving(langgraph: Path, folder: Path, own: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """(URL, runs directory) of a development server; own: its AGENTMERGE_SERVER_CONFIG."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, runs = f"http://127.0.0.1:{port}", folder / "runs"
    (folder / "server.yml").write_text(yaml.safe_dump(own))
    line = [langgraph, "dev", "--no-browser", "--no-reload"]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        [*line, "--host", "127.0.0.1", "--port", str(port)],
        cwd=ROOT,
        env=environment(runs),
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{url}/ok", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
        yield url, runs
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture
def server(langgraph: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, runs directory) of a development server that runs until the test is over."""
    with serving(langgraph, tmp_path, {"worker": BODY["worker"]}) as found:
        yield found
