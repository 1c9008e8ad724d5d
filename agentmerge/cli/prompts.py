"""``prompts``: list, show, copy and try the agents' prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, show, copy or try the agents' prompts."
)

Override = Annotated[
    Path | None, typer.Option("--prompts", help="Folder of prompts that replace ours.")
]


@app.command("list")
def list_prompts(prompts: Override = None, as_json: options.Json = False) -> int:
    """List the prompts. Whose each is, its file, its hash and the variables it uses."""
    from agentmerge.agents.prompts import VARIABLES, load_prompts
    from agentmerge.cli.render import table

    loaded = load_prompts(prompts)
    found = [
        {
            "name": role,
            "path": str(getattr(loaded, role).path),
            "sha256": getattr(loaded, role).sha,
            "variables": sorted(getattr(loaded, role).variables),
            "required": sorted(VARIABLES[role].required),
        }
        for role in VARIABLES
    ]
    rows = [["name", "sha256", "file"]]
    rows += [[str(f["name"]), str(f["sha256"])[:12], str(f["path"])] for f in found]
    show_result(found, as_json, table(rows, numbers=False))
    return 0


@app.command()
def show(name: str, prompts: Override = None, as_json: options.Json = False) -> int:
    """Print a prompt as it is written, and the variables that it may use."""
    from agentmerge.agents.prompts import VARIABLES, load_prompts, prompt_of

    prompt = prompt_of(load_prompts(prompts), name)
    allowed = sorted(VARIABLES[name].allowed)
    found = {"name": name, "path": str(prompt.path), "text": prompt.text, "variables": allowed}
    show_result(found, as_json, f"{prompt.text.rstrip()}\n\nvariables: {', '.join(allowed)}")
    return 0


@app.command()
def eject(directory: Path, as_json: options.Json = False) -> int:
    """Copy the prompts to a folder of yours. Files that exist are left alone."""
    from agentmerge.agents.prompts import eject as ejected

    written = [str(path) for path in ejected(directory)]
    text = "\n".join(f"wrote {path}" for path in written) or "every prompt is there already"
    show_result(
        written, as_json, f"{text}\nuse them with: agentmerge run ... --prompts {directory}"
    )
    return 0


@app.command("try")
def try_prompt(
    name: str,
    run: Annotated[str, typer.Option("--run", help="The search whose history fills it.")],
    prompts: Override = None,
    generation: Annotated[
        int | None, typer.Option("--generation", help="As of which; by default the last.")
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
) -> int:
    """Show what a model would be sent. For a real search, and about how many tokens."""
    from agentmerge.session.preview import preview

    found = preview(run, name, generation=generation, prompts=prompts, runs_dir=runs_dir)
    parts = [f"--- {m['role']} ---\n{m['content']}" for m in found["messages"]]
    tokens = f"about {found['tokens']} tokens"
    if found["tokens_measured"] is not None:
        tokens += f" (the search's own question then took {found['tokens_measured']})"
    show_result(found, as_json, "\n\n".join([*parts, tokens]))
    return 0
