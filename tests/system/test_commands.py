"""A user's program: bounds of time and size, what it may know, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentmerge.errors import TaskError, UserError
from agentmerge.system import commands
from agentmerge.system.commands import (
    Running,
    described_command,
    open_environment,
    refuse_missing,
)

#: Leaves a child behind whose number it tells, and waits for it where told to.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
if sys.argv[1] == "stay":
    child.wait()
"""


def gone(process: int) -> bool:
    """Whether it is soon no more than a name that nobody has read the end of."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *words]


@pytest.mark.parametrize("how", ["stay", "leave"])
def test_what_it_started_ends_with_it(how: str) -> None:
    with Running(python(PARENT, how), b"", os.environ) as running:
        if how == "leave":
            assert running.wait(20)
        else:
            while not running.said.endswith(b"\n"):
                time.sleep(0.01)
    assert running.code == (0 if how == "leave" else None)
    assert gone(int(running.said))


def test_it_ends_with_whoever_asked_for_it(tmp_path: Path) -> None:
    asking = (
        "import os, sys, time\n"
        "from agentmerge.system.commands import Running\n"
        f"running = Running([sys.executable, '-S', '-c', {PARENT!r}, 'stay'], b'', os.environ)\n"
        "while not running.said.endswith(b'\\n'): time.sleep(0.01)\n"
        "print(running.said.decode(), flush=True)\n"
        "time.sleep(600)\n"
    )
    asker = subprocess.Popen([sys.executable, "-c", asking], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    child = int(asker.stdout.readline())
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    asker.stdout.close()
    assert gone(child)


def test_what_it_reads_and_says_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MOST_SAID", 1000)
    with Running(python("print('x' * 10_000)"), b"", os.environ) as running:
        assert running.wait(20)
    assert running.too_long
    # It reads nothing of what is more than a pipe holds, and complains without end.
    code = "import sys; [print('no', i, file=sys.stderr) for i in range(9999)]; sys.exit(3)"
    with Running(python(code), b"x" * 10**6, os.environ) as running:
        assert running.wait(20)
    assert (running.code, running.said) == (3, b"")
    assert running.complaint.endswith("no 9998")
    assert len(running.complaint) < 400


def test_it_is_started_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "k")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret-word@proxy:1")
    monkeypatch.setenv("GRADER_TOKEN", "grader-token-1")
    monkeypatch.setenv("SUITE_FOLDER", "here")
    found = open_environment(["GRADER_TOKEN"])
    assert (found["SUITE_FOLDER"], found["GRADER_TOKEN"]) == ("here", "grader-token-1")
    assert "PATH" in found
    assert not found.keys() & {"SERVICE_API_KEY", "HTTPS_PROXY"}


def test_a_command_is_what_its_files_are(tmp_path: Path) -> None:
    def described(folder: Path) -> list[object]:
        return described_command([sys.executable, str(folder / "s.py"), str(folder / "d"), "-v"])

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.py").write_text("import beside\n")
        (tmp_path / name / "beside.py").write_text("x = 1\n")
        (tmp_path / name / "d").write_text("1")
    first = described(tmp_path / "a")
    assert first == described(tmp_path / "b")
    assert (first[0], first[3]) == (Path(sys.executable).name, "-v")
    (tmp_path / "b" / "beside.py").write_text("x = 2\n")
    assert first != described(tmp_path / "b")
    (tmp_path / "a" / "d").write_text("12")
    assert first != described(tmp_path / "a")
    with pytest.raises(UserError, match="no program 'no-such-program'"):
        refuse_missing(["no-such-program"], "the scorer")


def test_a_command_that_is_too_long_is_a_sentence() -> None:
    numbers = ",".join(map(str, range(40_000)))
    with pytest.raises(TaskError, match=r"a word of \d+ characters, '0,1,2,.*\{items\}"):
        Running(python("", numbers), b"", os.environ)


def test_a_program_and_an_options_value_are_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("judge", "rubric.json", "python3.11"):
        (tmp_path / name).write_bytes(b"\x7fELF 1")

    def described() -> list[object]:
        return described_command(["~/judge", "--rubric=~/rubric.json", "--x=1"])

    first = described()
    assert first[2] == "--x=1"
    (tmp_path / "rubric.json").write_bytes(b"2 longer")
    second = described()
    assert (second[0], second[1] == first[1]) == (first[0], False)
    (tmp_path / "judge").write_bytes(b"\x7fELF 22")
    assert described()[0] != first[0]
    (tmp_path / "judge").chmod(0o111)  # who may run it may not read it
    assert described_command(["~/python3.11", "judge"]) == ["python3.11", "judge"]


def test_words_that_are_no_file_names_are_words() -> None:
    words = ["x" * 300, "~nobody-of-that-name/x", "a\0b", "--key=" + "y" * 300]
    assert described_command(["python", "-c", *words]) == ["python", "-c", *words]
    with pytest.raises(UserError, match="there is no program '~nobody-of-that-name/x'"):
        refuse_missing(["~nobody-of-that-name/x"], "the scorer")
