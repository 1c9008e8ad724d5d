"""One chart or page as a PNG, for a README, by a browser of this machine; charts by plotly."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.report import figures
from agentmerge.report.content import content
from agentmerge.report.html import as_json, plotly_js
from agentmerge.system.temporary import replacing, temporary_folder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 900, 480


def take_picture(ledger: Ledger, names: Sequence[str], to: Path) -> Path:
    """Write the best so far of one search (with its rivals), or of several, to ``to``.

    Raises:
        UserError: no browser is installed, it failed, or the file cannot be written.
    """
    rows = [content(ledger, ledger.run(name)) for name in dict.fromkeys(names)]
    figure = figures.progress(rows[0]) if len(rows) == 1 else figures.overview(rows)
    title = f"{', '.join(found.row.name for found in rows)}: best so far"
    figure["layout"] |= {"height": HEIGHT, "width": WIDTH, "paper_bgcolor": "#ffffff"}
    figure["layout"] |= {"title": {"text": title, "x": 0.02, "font": {"size": 16}}}
    figure["layout"]["margin"] |= {"t": 48}
    text = (
        '<!doctype html><meta charset="utf-8"><body style="margin:0"><div id="c"></div>'
        f"<script>{plotly_js()}</script><script>const f={as_json(figure)};"
        'Plotly.newPlot("c",f.data,f.layout,{staticPlot:true})</script>'
    )
    return photograph(text, to, "--png", WIDTH, HEIGHT)


def photograph(page_text: str, to: Path, option: str, width: int, height: int) -> Path:
    """What a browser of this machine shows of a page, as a PNG. option: to say where it fails.

    Raises:
        UserError: no browser is installed, it failed, or the file cannot be written.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise UserError(f"{option} needs a browser: install one of {', '.join(BROWSERS[:3])}")
    with temporary_folder("agentmerge-picture") as folder:
        page = folder / "chart.html"
        page.write_text(page_text, encoding="utf-8")
        picture = folder / "chart.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        command += ["--virtual-time-budget=5000", f"--screenshot={picture}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not picture.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{browser} took no picture: {last}")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with replacing(to) as draft:
                shutil.copyfile(picture, draft)
        except OSError as error:
            raise UserError(f"{option} {to} cannot be written: {error.strerror}") from None
    return to
