"""The command line's table of commands, and how every one of them ends.

A command reads its options, calls one function of the library and shows the result; each group of
them is a module beside this one.
"""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Annotated

import typer

from agentmerge.cli import (
    comparing,
    databases,
    housekeeping,
    inspecting,
    prompts,
    results,
    searching,
    serving,
    starting,
    watching,
)
from agentmerge.cli.terminal import Interrupted, failed, forsake_stdout

#: What is said of a file that has no room, or a device that is gone.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find the best merge of several fine-tunes of one base language model.",
)

for command in (
    starting.init,
    searching.run,
    inspecting.check,
    inspecting.survey,
    searching.resume,
    searching.branch,
    searching.stop,
    watching.watch,
    serving.ui,
    results.list_runs,
    results.show,
    results.best,
    results.export,
    results.report,
    comparing.compare,
    comparing.tree,
    results.replay,
    inspecting.evaluate,
    inspecting.explain,
    inspecting.methods,
    inspecting.mcp,
    housekeeping.gc,
    housekeeping.demo,
    housekeeping.doctor,
):
    app.command(command.__name__.removesuffix("_runs"))(command)
app.add_typer(prompts.app, name="prompts")


app.add_typer(starting.tasks, name="tasks")
app.add_typer(databases.app, name="ledger")


def run_app(arguments: list[str]) -> int:
    """The exit code of a command line: 0, 2 for the user's mistake, 1 for a run that failed."""
    from agentmerge.system.redaction import clean_screen

    with clean_screen():
        return _ended(arguments)


def _ended(arguments: list[str]) -> int:
    from agentmerge.errors import AgentmergeError

    try:
        result = app(args=arguments, standalone_mode=False, prog_name="agentmerge")
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except AgentmergeError as error:
        return failed(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt, Interrupted):
        return failed("stopped; everything scored is saved", 130)
    except BrokenPipeError:  # `agentmerge ... | head`
        forsake_stdout()
        return 0
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            forsake_stdout()
            return failed(
                f"a result cannot be written: {error.strerror}; what is in the runs directory is "
                "saved, so make room and ask again (agentmerge show, best, resume)",
                1,
            )
        if error.filename is None or error.strerror is None:
            return failed(f"{_first_line(error)}{_crash_file()}", 1)
        return failed(f"{error.filename} cannot be used: {error.strerror}", 2)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's and click's own errors have it
        if usage is None:
            return failed(f"{_first_line(error)}{_crash_file()}", 1)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(usage(), file=sys.stderr)
            return 2
        return failed(f"{usage()} (agentmerge COMMAND --help lists the options)", 2)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}: {text[0] if text else 'no message'}"


def _crash_file() -> str:
    """Where an unexpected error's traceback went, so that nobody has to see it, in brackets."""
    from agentmerge.system.redaction import redact
    from agentmerge.system.temporary import crash_file

    try:
        return f" (details in {crash_file(redact(traceback.format_exc()))})"
    except OSError as error:
        return f" (its details could not be written: {error.strerror})"


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        from agentmerge import __version__

        print(__version__)
        raise typer.Exit
