from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
