from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

import pool_tasks as tasks
import pytest

import tpool
from tpool.local import shared_zygote as module
from tpool.local.shared_zygote import SharedZygote


@pytest.mark.leaves("what plays the zygote lives until the test has ended it")
def test_a_zygote_on_its_way_out_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no connections any more, but its process is still there: taking torch down may last a second."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn_interpreter(name: str, function: str, code: str, fd: int, environment: object) -> int:
        # The first one has no end of the control socket left, as if it had closed it; the second one reads it.
        program = "import time; time.sleep(600)" if not started else "import sys; sys.stdin.buffer.read()"
        stdin = subprocess.DEVNULL if not started else os.dup(fd)
        started.append(subprocess.Popen([sys.executable, "-S", "-c", program], stdin=stdin))
        if started[1:]:
            os.close(stdin)
        return started[-1].pid

    monkeypatch.setattr(module, "spawn_interpreter", spawn_interpreter)
    shared = SharedZygote(())
    sock = shared.connect()
    try:
        assert len(started) == 2
        assert not os.path.exists(f"/proc/{started[0].pid}")
        assert shared.trace() is not None
        assert shared.pid == started[1].pid
        shared.connect().close()  # the second one serves
        assert len(started) == 2
    finally:
        sock.close()
        started[1].kill()
        for process in started:
            process.wait()
        shared._forget()


@pytest.mark.leaves("the zygote with this list of modules lingers")
def test_an_interrupt_while_the_zygote_starts_harms_no_later_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn_interpreter = module.spawn_interpreter

    def spawn_interrupted(*args: Any) -> int:
        pid = spawn_interpreter(*args)
        os.kill(os.getpid(), signal.SIGINT)  # just before anybody knows the process
        return pid

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "spawn_interpreter", spawn_interrupted)
            with pytest.raises(KeyboardInterrupt):
                tpool.Pool(1, preload=["sched"])
    finally:
        signal.signal(signal.SIGINT, before)
    with tpool.Pool(1, preload=["sched"]) as pool:
        assert pool.apply_async(tasks.identity, (1,)).get(30) == 1
