"""How the live page holds up: a search of very many candidates, and many searches at once.

    python -m benchmarks.pages --candidates 100000 --running 10
    python -m benchmarks.pages --pictures docs

The first fills a database as ``benchmarks.ledger`` does and times every page of it (the least of
three answers, and the first paint where Chromium and playwright are here). Then it starts searches
on the fake worker, each a process of its own, follows all of them as open pages do, and says how
long others waited for the list meanwhile. A search whose page does not come to its end is an error.

The second makes a family of searches and takes the pictures of docs/ui.md, at two widths.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.ledger.folder import LEDGER
from agentmerge.session import driving
from benchmarks.ledger import fill

RUNNING = """\
genome: {models: [north, south, east], base_model: base, merge_method: ties, layer_granularity: 2}
tasks: [{name: sums, metric: "acc,none"}, {name: words, metric: "acc,none", weight: 0.5}]
limit: 60
search: {algorithm: cma_es, seed: 3, population: 6}
worker: {kind: fake, options: {num_layers: 8, base: base, delay_s: 0.1}}
budget: {max_evaluations: 60}
"""
SHOWN = "/run/sums-and-words"
#: Picture -> its page, size, colours, and what is at its top.
PICTURES: dict[str, tuple[str, tuple[int, int], str, str]] = {
    "ui-searches": ("/", (1100, 260), "light", "h1"),
    "ui-search": (SHOWN, (1100, 1000), "light", "h1"),
    "ui-phone": (SHOWN, (390, 780), "dark", "#run0-progress"),
}


@contextmanager
def served(runs: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of ``agentmerge ui``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agentmerge", "ui", "--runs-dir", runs.name, "--port", "0"],
        stderr=subprocess.PIPE, text=True, cwd=runs.parent,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        found = re.match(r"(http://\S+:\d+)/ ", process.stderr.readline())
        assert found is not None, "the page was not served"
        yield found[1], process.pid
    finally:
        process.terminate()
        process.communicate()


def answer(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=300) as found:
        return bytes(found.read())


def timed(address: str, times: int = 3) -> tuple[float, int]:
    """(the least seconds, bytes) of an answer."""
    least, size = float("inf"), 0
    for _ in range(times):
        began = time.perf_counter()
        size = len(answer(address))
        least = min(least, time.perf_counter() - began)
    return least, size


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, or None where it or playwright is missing."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        yield None
        return
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def painted(chromium: Any, address: str) -> float | None:
    """Seconds until a page's first words are seen."""
    if chromium is None:
        return None
    page = chromium.new_page()
    page.goto(address, wait_until="load", timeout=300_000)
    script = "(performance.getEntriesByName('first-contentful-paint')[0] || {}).startTime"
    until = time.monotonic() + 60
    while (found := page.evaluate(script)) is None and time.monotonic() < until:
        page.wait_for_timeout(50)
    page.close()
    return None if found is None else found / 1000


def sizes(runs: Path, candidates: int) -> dict[str, Any]:
    """Every page of a search of ``candidates``, and its past read to the end."""
    fill(runs / LEDGER, candidates, 50, 1)
    name = "/run/search-0"
    pages = {
        "searches": "/", "search": name, "candidates": f"{name}/candidates",
        "candidates, by score": f"{name}/candidates?sort=score&way=down",
        "candidates, that contain": f"{name}/candidates?containing=model-1",
        "candidate": f"{name}/candidate/1.1", "charts": f"/api{name}/report", "lineage": "/lineage",
    }  # fmt: skip
    found: dict[str, Any] = {}
    with served(runs) as (address, pid), browser() as chromium:
        for page, path in pages.items():
            seconds, size = timed(address + path)
            paint = None if page == "charts" else painted(chromium, address + path)
            found[page] = {"seconds": seconds, "bytes": size, "first_paint_s": paint}
        began, looks = time.perf_counter(), 0
        while not json.loads(answer(f"{address}/api{name}/board"))["read"]:
            looks += 1
        found["past"] = {"seconds": time.perf_counter() - began, "looks": looks}
        found["memory_mb"] = resident_mb(pid)
    return found


def followed(address: str, ends: dict[str, Any], name: str) -> None:
    """As an open page does, until the search is done."""
    messages, began = 0, time.perf_counter()
    with urllib.request.urlopen(f"{address}/run/{name}/live", timeout=600) as stream:
        for line in stream:
            if not line.startswith(b"data: "):
                continue
            messages += 1
            board = json.loads(line[6:]).get("board", {})
            if board.get("status") == "done" and board["read"]:
                break
    ends[name] = board | {"a_second": messages / (time.perf_counter() - began)}


def running(runs: Path, count: int) -> dict[str, Any]:
    """``count`` searches at once, each followed by a page."""
    runs.mkdir()
    config = runs / "config.yml"
    config.write_text(RUNNING)
    names = [f"search-{number}" for number in range(count)]
    command = [
        sys.executable,
        "-m",
        "agentmerge",
        "run",
        str(config),
        "--runs-dir",
        str(runs),
        "-q",
    ]
    searches = [
        subprocess.Popen([*command, "--name", name, "--seed", str(seed)], stdout=subprocess.DEVNULL)
        for seed, name in enumerate(names)
    ]
    while any(not (runs / name / "best.yml").exists() for name in names):
        time.sleep(0.1)
    ends: dict[str, Any] = {}
    waits = []
    with served(runs) as (address, pid):
        pages = [threading.Thread(target=followed, args=(address, ends, name)) for name in names]
        for page in pages:
            page.start()
        while any(page.is_alive() for page in pages):
            waits.append(timed(f"{address}/api/", 1)[0])
            time.sleep(0.5)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        memory = resident_mb(pid)
    codes = [search.wait() for search in searches]
    assert codes == [0] * count, codes
    assert all(ends[name]["evaluations"] == 60 for name in names), "a page missed an end"
    return {
        "searches": count,
        "list_s": {"median": sorted(waits)[len(waits) // 2], "most": max(waits)},
        "messages_a_second": max(end["a_second"] for end in ends.values()),
        "server_cpu_s": (int(fields[11]) + int(fields[12])) / 100,
        "memory_mb": memory,
    }


def pictures(folder: Path) -> None:
    """``ui-search.png`` and the like, of a search and one that branched from it."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary, browser() as chromium:
        if chromium is None:
            raise SystemExit(
                "pictures need Chromium and playwright: pip install 'agentmerge[browser]'"
            )
        runs = Path(temporary) / "runs"
        quick = SearchConfig.from_text(RUNNING.replace("delay_s: 0.1", "delay_s: 0.001"))
        driving.run(quick, name="sums-and-words", runs_dir=runs)
        other = {"search.algorithm": "random"}
        driving.branch("sums-and-words", at=2, name="at-random", runs_dir=runs, overrides=other)
        with served(runs) as (address, _):
            for name in PICTURES:
                _picture(chromium, address, folder / f"{name}.png")
    for path in (folder / f"{name}.png" for name in PICTURES):
        with Image.open(path) as picture:
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(
                path, optimize=True
            )
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


def _picture(chromium: Any, address: str, to: Path) -> None:
    path, (width, height), colours, top = PICTURES[to.stem]
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme=colours
    )
    page = context.new_page()
    page.goto(address + path, timeout=300_000)
    if path == SHOWN:
        page.wait_for_selector("#run0-distribution .plot-container", timeout=300_000)
    page.locator(top).first.evaluate("it => (it.closest('section') || it).scrollIntoView()")
    page.wait_for_timeout(1500)
    page.screenshot(path=str(to))
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--running", type=int, default=10)
    parser.add_argument("--pictures", type=Path, help="take the pictures of docs/ui.md into this")
    asked = parser.parse_args()
    if asked.pictures:
        pictures(asked.pictures)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "many").mkdir()
        found = {
            "candidates": asked.candidates,
            "pages": sizes(Path(folder) / "many", asked.candidates),
            "at_once": running(Path(folder) / "running", asked.running),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
