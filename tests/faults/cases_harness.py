"""Cases that must not pass: the harness is tested with them. They make no pool."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import procs
from .script import Env, NotPossible, case, main, mark

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


@case(0, "passes")
def passes(env: Env):
    mark("here", 1)
    assert [one.value for one in env.marks("here")] == ["1"], "marks of another case"
    env.note("a note")


@case(0, "passes too, after another that passed")
def passes_again(env: Env):
    passes(env)


@case(0, "fails")
def fails(env: Env):
    raise AssertionError("as it should")


@case(0, "hangs", deadline=0.5)
def hangs(env: Env):
    threading.Event().wait()


@case(0, "hangs where no Python runs", deadline=0.5)
def hangs_in_c(env: Env):
    sum(iter(int, 1))


@case(0, "takes the interpreter down")
def crashes(env: Env):
    os._exit(3)


@case(0, "cannot be played")
def impossible(env: Env):
    raise NotPossible("not here")


# Three, because a peer's helpers (fork server, resource tracker) are let stay until the interpreter ends.
@case(0, "leaves processes")
def leaves_process(env: Env):
    for _ in range(3):
        subprocess.Popen(SLEEP)


@case(0, "leaves processes with an empty environment")
def leaves_strangers(env: Env):
    for _ in range(3):
        subprocess.Popen(SLEEP, env={})


@case(0, "leaves processes in sessions of their own")
def leaves_daemons(env: Env):
    daemons = [subprocess.Popen(SLEEP, start_new_session=True) for _ in range(3)]
    # Popen returns a moment before the new program has its environment, by which it is found.
    environments = [Path(f"/proc/{daemon.pid}/environ") for daemon in daemons]
    assert procs.wait_until(lambda: all(path.read_bytes() for path in environments), 5)


@case(0, "leaves descriptors")
def leaves_descriptors(env: Env):
    for _ in range(20):
        os.open("/dev/null", os.O_RDONLY)


@case(0, "leaves a name in /dev/shm", alone=True)
def leaves_shm(env: Env):
    name = f"faults-leak-{os.getpid()}"
    if not os.environ["FAULTS_PRIVATE_SHM"]:
        raise NotPossible("it would stay in the machine's own /dev/shm")
    (Path("/dev/shm") / name).write_text("x")


@case(0, "leaves a temporary file", alone=True)
def leaves_file(env: Env):
    (Path(os.environ["TMPDIR"]) / "left").write_text("x")


@case(0, "prints a traceback")
def prints_traceback(env: Env):
    sys.stderr.write("Traceback (most recent call last):\n  somewhere\n")


@case(0, "may print a traceback", prints=True)
def may_print_traceback(env: Env):
    prints_traceback(env)


def _hang_at_exit():
    time.sleep(1000)


@case(0, "hangs when the interpreter ends", alone=True)
def hangs_at_exit(env: Env):
    import atexit

    atexit.register(_hang_at_exit)


if __name__ == "__main__":
    main()
