"""One search, one process: a live holder is respected, a dead one is replaced."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from agentmerge.errors import LeaseHeld, RunFailed, UserError
from agentmerge.ledger.lease import Lease

HOLD = """
import sys, time
from agentmerge.ledger.lease import Lease
with Lease.acquire(sys.argv[1], "t", name="fox"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "checkpoints.sqlite"


@pytest.fixture
def holder(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def rewrite(path, **columns):
    with closing(sqlite3.connect(path)) as conn, conn:
        for column, value in columns.items():
            conn.execute(f"UPDATE leases SET {column} = ?", (value,))


def test_taken_and_given_back(path):
    assert Lease.holder(path, "t") is None
    with Lease.acquire(path, "t"):
        assert Lease.holder(path, "t").pid == os.getpid()
    assert Lease.holder(path, "t") is None
    with Lease.acquire(path, "t"):
        pass


def test_other_searches_are_free(path):
    with Lease.acquire(path, "t"), Lease.acquire(path, "u"):
        assert Lease.holder(path, "t").token != Lease.holder(path, "u").token


def test_given_back_when_the_block_raises(path):
    with pytest.raises(RuntimeError), Lease.acquire(path, "t"):
        raise RuntimeError
    assert Lease.holder(path, "t") is None


def test_twice_in_one_process_is_refused(path):
    with (
        Lease.acquire(path, "t", name="fox"),
        pytest.raises(LeaseHeld, match="'fox' is already running in this process"),
        Lease.acquire(path, "t", name="fox"),
    ):
        pass


def test_a_live_process_is_named_with_what_to_do(path, holder):
    with pytest.raises(LeaseHeld) as refused, Lease.acquire(path, "t", name="fox"):
        pass
    message = str(refused.value)
    assert f"process {holder.pid} on {os.uname().nodename}" in message
    assert "'fox'" in message
    assert "stop that process" in message
    assert refused.value.exit_code == 2


def test_a_killed_process_is_replaced_at_once(path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with Lease.acquire(path, "t"):
        assert time.monotonic() - started < 5


def test_a_killed_process_that_nobody_waited_for_is_replaced_too(path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Lease.holder(path, "t") is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with Lease.acquire(path, "t"):
        assert Lease.holder(path, "t").pid == os.getpid()


OFF = [-86_400.0, -61.0, 0.0, 61.0, 86_400.0]
BEAT = """
import sqlite3, sys, time
path, off = sys.argv[1], float(sys.argv[2])
for beat in range(100):
    with sqlite3.connect(path, timeout=10) as conn:
        conn.execute("UPDATE leases SET heartbeat = ?, host = 'elsewhere', token = 'theirs'",
                     (time.time() + off,))
    conn.close()
    print("beat", flush=True)
    time.sleep(0.2)
"""


@pytest.fixture
def elsewhere(path):
    """Leaves a row of another host, as if it had been killed."""

    def leave(off):
        with Lease.acquire(path, "t"):
            rewrite(path, heartbeat=time.time() + off, host="elsewhere", token="theirs")

    return leave


@pytest.mark.parametrize("off", OFF)
def test_another_host_that_is_silent_is_replaced_whatever_its_clock_says(path, elsewhere, off):
    """Not before it was silent for long enough by the own clock."""
    elsewhere(off)
    assert Lease.holder(path, "t").host == "elsewhere"
    heard = []
    began = time.monotonic()
    with Lease.acquire(path, "t", stale_after_s=0.4, name="fox", say=heard.append):
        assert time.monotonic() - began >= 0.4
        assert Lease.holder(path, "t").pid == os.getpid()
    assert "on elsewhere had search 'fox'; waiting up to 0 s" in heard[0]


@pytest.mark.parametrize("off", OFF)
def test_another_host_that_beats_is_at_work_whatever_its_clock_says(path, elsewhere, off):
    elsewhere(off)
    command = [sys.executable, "-c", BEAT, str(path), str(off)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as beating:
        beating.stdout.readline()
        with (
            pytest.raises(LeaseHeld, match="on elsewhere"),
            Lease.acquire(path, "t", stale_after_s=5.0),
        ):
            pass
        beating.kill()
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("SELECT token FROM leases").fetchall() == [("theirs",)]


@pytest.mark.parametrize("what", ["deleted", "moved", "replaced"])
def test_a_file_that_is_gone_is_no_takeover(path, what):
    """Nor is another one made in its place."""
    with Lease.acquire(path, "t", stale_after_s=0.2, name="fox") as lease:
        os.rename(path, path.with_name("elsewhere.sqlite"))
        if what == "replaced":
            path.write_bytes(b"")
        elif what == "deleted":
            path.with_name("elsewhere.sqlite").unlink()
        time.sleep(0.3)
        with pytest.raises(RunFailed, match="was deleted, moved or replaced while the search ran"):
            lease.check()
    assert path.exists() is (what == "replaced")
    assert not path.exists() or path.read_bytes() == b""


@pytest.mark.parametrize("off", [-40, -400 * 86400, 400 * 86400])
def test_a_live_process_of_this_host_is_never_replaced(path, holder, off):
    """A machine that slept, a file that was locked for minutes, or a clock that was set since costs
    it heartbeats only."""
    rewrite(path, heartbeat=time.time() + off)
    assert Lease.holder(path, "t").pid == holder.pid
    with (
        pytest.raises(LeaseHeld, match="stop that process"),
        Lease.acquire(path, "t", stale_after_s=30),
    ):
        pass


@pytest.mark.parametrize("left_by", ["this version", "another boot", "an earlier version"])
def test_another_process_with_the_pid_is_not_the_holder(path, holder, left_by):
    token = Lease.holder(path, "t").token
    number, _, birth = token.partition("@")
    boot, _, ticks = birth.partition(":")
    if left_by == "this version":
        rewrite(path, token=f"{number}@{boot}:{int(ticks) - 1}")
    elif left_by == "another boot":
        rewrite(path, token=f"{number}@{boot[::-1]}:{ticks}")
    else:
        rewrite(path, token=number, heartbeat=time.time() - 3600)  # long before that process began
    with Lease.acquire(path, "t"):
        assert Lease.holder(path, "t").pid == os.getpid()


def test_a_row_of_our_own_pid_from_an_earlier_life_is_replaced(path):
    with Lease.acquire(path, "t"):
        rewrite(path, token="from before the container restarted")
        with Lease.acquire(path, "t") as lease:
            assert Lease.holder(path, "t").token == lease.token


def test_the_heartbeat_keeps_a_short_lease(path):
    with Lease.acquire(path, "t", stale_after_s=0.4):
        rewrite(path, host="elsewhere")
        time.sleep(1.0)
        with pytest.raises(LeaseHeld), Lease.acquire(path, "t", stale_after_s=0.4):
            pass


def test_a_lease_taken_over_is_noticed(path):
    with Lease.acquire(path, "t", stale_after_s=0.2, name="fox") as lease:
        lease.check()
        rewrite(path, token="theirs")
        time.sleep(0.4)
        with pytest.raises(LeaseHeld, match="'fox' was taken over"):
            lease.check()
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("SELECT token FROM leases").fetchall() == [("theirs",)]


def test_shares_the_file_with_the_saver(path):
    from agentmerge.session.checkpoints import open_saver

    with open_saver(path) as saver, Lease.acquire(path, "t"):
        saver.prune(["t"])
        assert Lease.holder(path, "t") is not None


def test_who_listens_is_asked_to_stop_once(path, monkeypatch):
    monkeypatch.setattr("agentmerge.ledger.lease._LISTEN_EVERY_S", 0.01)
    heard = []
    with Lease.acquire(path, "t", name="fox", asked=lambda: heard.append("stop")):
        for _ in range(2):
            assert Lease.ask_to_stop(path, "t", "fox").pid == os.getpid()
        until = time.monotonic() + 10
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert heard == ["stop"]
    with pytest.raises(UserError, match="'fox' does not run"):
        Lease.ask_to_stop(path, "t", "fox")
    # What was asked of one holder is nothing to the next, nor left behind by one that died.
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("INSERT INTO stops VALUES ('gone', 1)")
    with Lease.acquire(path, "t", asked=lambda: heard.append("again")):
        time.sleep(0.05)
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("SELECT asked FROM stops").fetchall() == [(0,)]
    assert heard == ["stop"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_fails_does_not_end_the_lease(path, monkeypatch):
    monkeypatch.setattr("agentmerge.ledger.lease._LISTEN_EVERY_S", 0.01)
    heard = []

    def listen() -> None:
        heard.append("stop")
        raise OSError("the terminal is gone")

    with Lease.acquire(path, "t", name="fox", stale_after_s=1.0, asked=listen) as lease:
        Lease.ask_to_stop(path, "t", "fox")
        until = time.monotonic() + 10
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
        asked = time.time()
        until = time.monotonic() + 10
        renewed = 0.0
        while renewed <= asked and time.monotonic() < until:
            time.sleep(0.01)
            with closing(sqlite3.connect(path)) as conn:
                [(renewed,)] = conn.execute("SELECT heartbeat FROM leases").fetchall()
        assert renewed > asked
        lease.check()


def test_a_holder_that_does_not_listen_says_so(path, holder):
    with pytest.raises(UserError, match="cannot be asked to stop from elsewhere; stop it there"):
        Lease.ask_to_stop(path, "t", "fox")


def test_a_holder_that_ends_while_it_is_asked_is_nobody_to_stop(path, monkeypatch):
    from agentmerge.ledger import lease

    with Lease.acquire(path, "t", asked=lambda: None):
        left = Lease.holder(path, "t")
    looks = iter([left, None])
    monkeypatch.setattr(lease, "_looked_up", lambda *_: next(looks))
    monkeypatch.setattr(lease, "_held", {left.token})
    with pytest.raises(UserError, match="'fox' does not run"):
        Lease.ask_to_stop(path, "t", "fox")


def test_a_lease_of_an_earlier_version_cannot_be_asked(path, holder):
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("DROP TABLE stops")
    with pytest.raises(UserError, match="cannot be asked to stop"):
        Lease.ask_to_stop(path, "t", "fox")
