"""The helpers that other tests lean on do what they say."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
from support import process_info, processes, run_script, wait_until


def test_wait_until_gives_the_first_true_value() -> None:
    answers = iter([0, "", "yes", "later"])
    assert wait_until(lambda: next(answers), 5.0) == "yes"


def test_wait_until_says_what_did_not_happen() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the tide"):
        wait_until(lambda: False, 0.05, "the tide")


def test_wait_until_asks_once_more_than_never() -> None:
    assert wait_until(lambda: True, 0.0)


def test_wait_until_sees_another_thread() -> None:
    event = threading.Event()
    thread = threading.Timer(0.05, event.set)
    thread.start()
    wait_until(event.is_set, 5.0)
    thread.join()


def test_process_table_holds_this_process() -> None:
    info = process_info(os.getpid())
    assert info is not None
    assert (info.parent, info.group, info.session) == (os.getppid(), os.getpgrp(), os.getsid(0))
    assert info.alive
    assert "python" in info.command() or "pytest" in info.command()
    assert info.pid in {other.pid for other in processes()}


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        wait_until(lambda: (info := process_info(pid)) is not None and not info.alive, 5.0)
    finally:
        os.waitpid(pid, 0)
    assert process_info(pid) is None


def test_script_gives_output_status_and_arguments() -> None:
    result = run_script(
        """
        import os, sys
        print(sys.argv[1:], os.environ["COLOUR"], "SHAPE" in os.environ, os.listdir())
        print("oh", file=sys.stderr)
        sys.exit(3)
        """,
        timeout=30,
        env={"COLOUR": "blue", "SHAPE": None},
        args=("a", "b"),
    )
    assert result.stdout == "['a', 'b'] blue False ['script.py']\n"
    assert result.stderr == "oh\n"
    assert result.returncode == 3
    assert not result.timed_out
    assert result.survivors == ()
    with pytest.raises(AssertionError, match="exit status 3"):
        result.expect_success()


def test_script_finds_our_modules_and_takes_options() -> None:
    source = """
        import sys, support
        print(support.__file__, sys.warnoptions)
    """
    result = run_script(source, timeout=30, options=("-W", "error")).expect_success()
    assert result.stdout == f"{sys.modules['support'].__file__} ['error']\n"


def test_script_is_killed_at_its_deadline_with_all_its_processes() -> None:
    result = run_script(
        """
        import os, signal
        if os.fork() == 0:
            os.setsid()  # leaves the session and the group
        print(os.getpid(), flush=True)
        signal.pause()
        """,
        timeout=1.0,
    )
    assert result.timed_out
    assert result.returncode == -signal.SIGABRT
    assert "signal.pause()" in result.stderr or "line 6" in result.stderr, "the traceback of the main thread"
    pids = [int(line) for line in result.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        wait_until(lambda: (info := process_info(pid)) is None or not info.alive, 5.0, f"{pid} to be gone")
    with pytest.raises(AssertionError, match="ran out of time"):
        result.expect_success()


def test_script_that_ignores_the_first_signal_is_killed() -> None:
    source = """
        import signal
        signal.signal(signal.SIGABRT, signal.SIG_IGN)
        while True:
            signal.pause()
    """
    result = run_script(source, timeout=0.5)
    assert result.timed_out
    assert result.returncode == -signal.SIGKILL


def test_script_tells_its_survivors() -> None:
    source = """
        import os, signal
        if os.fork() == 0:
            signal.pause()
    """
    result = run_script(source, timeout=30, grace=0.2)
    assert result.returncode == 0
    assert len(result.survivors) == 1
    assert "script.py" in result.survivors[0]
    with pytest.raises(AssertionError, match="left behind"):
        result.expect_success()


def test_script_gives_its_processes_time_to_go() -> None:
    source = """
        import os, threading
        if os.fork() == 0:
            threading.Event().wait(0.3)
    """
    run_script(source, timeout=30).expect_success()
