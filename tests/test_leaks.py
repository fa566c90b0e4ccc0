"""The check for what tests leave behind catches a planted leak of each kind, and nothing else."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import threading
import timeit
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from leaks import Snapshot, expected_descriptors, expected_processes, find_leaks
from support import process_info, wait_until

from tpool import Pool
from tpool.local.shared_zygote import zygote_traces

pytest_plugins = ["pytester"]

Plant = Callable[[], object]


def python(source: str, **options: Any) -> subprocess.Popen[Any]:
    """Start an interpreter that finds the helpers of the tests."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.Popen([sys.executable, "-c", source], env=environment, **options)


@pytest.fixture
def plant_thread() -> Iterator[Plant]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="weed")
    yield thread.start
    stop.set()
    thread.join()


@pytest.fixture
def plant_process() -> Iterator[Plant]:
    children: list[subprocess.Popen[bytes]] = []

    def plant() -> None:
        children.append(python("input()", stdin=subprocess.PIPE))

    yield plant
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def plant_zombie() -> Iterator[Plant]:
    pids: list[int] = []

    def plant() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        pids.append(pid)

    yield plant
    for pid in pids:
        os.waitpid(pid, 0)


@pytest.fixture
def plant_orphan() -> Iterator[Plant]:
    """A grandchild whose parent is gone; it lives until a pipe of ours reaches its end."""
    reader, writer = os.pipe()
    source = f"import os\nif os.fork() == 0:\n    os.close({writer})\n    os.read({reader}, 1)"
    yield lambda: subprocess.call([sys.executable, "-c", source], pass_fds=(reader, writer))
    os.close(writer)
    os.close(reader)


@pytest.fixture
def plant_descriptor() -> Iterator[Plant]:
    found: list[int] = []
    yield lambda: found.append(os.memfd_create("weed"))
    for fd in found:
        os.close(fd)


@pytest.fixture
def plant_shm() -> Iterator[Plant]:
    path = Path("/dev/shm", f"weed-{uuid.uuid4().hex}")
    yield path.touch
    path.unlink(missing_ok=True)


KINDS = {
    "plant_thread": "thread weed",
    "plant_process": "process ",
    "plant_zombie": "state Z",
    "plant_orphan": "process ",
    "plant_descriptor": "memfd:weed",
    "plant_shm": "/dev/shm/weed-",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_leak_is_caught(kind: str, request: pytest.FixtureRequest) -> None:
    plant: Plant = request.getfixturevalue(kind)
    before = Snapshot.take()
    assert find_leaks(before, 0.0) == []
    plant()
    left = find_leaks(before, 0.1)
    # A Popen's pipe is a second finding beside the process.
    assert any(KINDS[kind] in leak for leak in left), left
    assert find_leaks(Snapshot.take(), 0.0) == [], "what was there before is no leak"


def test_what_is_on_its_way_out_is_no_leak() -> None:
    before = Snapshot.take()
    thread = threading.Timer(0.1, lambda: None)
    thread.start()
    assert before.leaks() == [f"thread {thread.name}"]
    assert find_leaks(before, 5.0) == []


def test_a_descriptor_number_used_again_is_a_leak() -> None:
    first = os.memfd_create("first")
    before = Snapshot.take()
    os.close(first)
    second = os.memfd_create("second")
    try:
        assert second == first
        assert find_leaks(before, 0.0) == [f"descriptor {second} -> /memfd:second (deleted)"]
    finally:
        os.close(second)


def test_garbage_in_a_cycle_is_no_leak() -> None:
    before = Snapshot.take()
    cycle: list[object] = [open(os.devnull, "rb", buffering=0)]  # noqa: SIM115 -- left to the collector on purpose
    cycle.append(cycle)
    assert before.leaks()
    del cycle
    with pytest.warns(ResourceWarning, match="unclosed file"):
        left = find_leaks(before, 0.0)
    assert left == []


def test_helpers_of_the_standard_library_are_expected() -> None:
    before = Snapshot.take()
    # A lock of these contexts starts the resource tracker; a process, the fork server.
    process = get_context("forkserver").Process(target=int)
    process.start()
    process.join()
    process.close()
    assert len(expected_processes()) >= 1
    assert len(expected_descriptors()) >= 1
    assert find_leaks(before) == []


def test_the_zygote_is_expected_and_nothing_else_of_a_pool() -> None:
    before = Snapshot.take()
    with Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        assert len(before.leaks()) >= 3, "a worker, a thread and some descriptors"
    pool.join()
    assert find_leaks(before) == []
    pids, fds = zygote_traces()
    assert len(pids) == len(fds) == 1
    assert pids <= expected_processes()
    assert fds <= expected_descriptors()


def test_processes_of_others_are_not_ours() -> None:
    """What our parent starts beside us is in our process group, and no leak of ours."""
    before = Snapshot.take()
    source = """if 1:
        import os, sys, leaks
        before = leaks.Snapshot.take()
        print("ready", flush=True)
        input()
        print(leaks.find_leaks(before, 0.1), flush=True)
    """
    one = python(source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert one.stdout is not None
    assert one.stdout.readline() == "ready\n"
    two = python("input()", stdin=subprocess.PIPE)
    assert one.communicate("\n", timeout=30)[0] == "[]\n"
    two.communicate(b"\n", timeout=30)
    assert find_leaks(before) == []


@pytest.mark.parametrize(
    ("maker", "mapped", "leaks"),
    [(0, False, True), (1, False, False), (0, True, False)],
    ids=["nobody's", "init's by its name", "mapped by its parent"],
)
def test_shared_memory_of_others_is_not_ours(maker: int, mapped: bool, leaks: bool) -> None:
    """Told from a child's view, so that we can be the others."""
    path = Path("/dev/shm", f"weed_{maker}_{uuid.uuid4().hex}")
    source = f"""if 1:
        import leaks, pathlib
        before = leaks.Snapshot.take()
        pathlib.Path({str(path)!r}).write_bytes(b"weed")
        print("ready", flush=True)
        input()
        print(leaks.find_leaks(before, 0.1), flush=True)
    """
    child = python(source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child, contextlib.ExitStack() as stack:
        stack.callback(path.unlink)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if mapped:
            file = stack.enter_context(path.open("r+b"))
            stack.enter_context(mmap.mmap(file.fileno(), 0))
        assert child.communicate("\n", timeout=30)[0] == f"{[str(path)] if leaks else []}\n"


def test_semaphores_of_others_are_not_ours() -> None:
    """Who makes one has mapped it under another name."""
    source = """if 1:
        import leaks
        before = leaks.Snapshot.take()
        print("ready", flush=True)
        input()
        print(len(before.leaks()), leaks.find_leaks(before, 0.1), flush=True)
    """
    child = python(source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        barrier = get_context("spawn").Barrier(2)
        seen, found = child.communicate("\n", timeout=30)[0].split(maxsplit=1)
        assert int(seen) >= barrier.parties
        assert found == "[]\n"


def test_a_look_is_cheap() -> None:
    before = Snapshot.take()
    # The best of some, as the machine is shared: two looks per test are to stay below 2 ms.
    assert min(timeit.repeat(Snapshot.take, number=1, repeat=20)) < 0.001
    assert min(timeit.repeat(before.leaks, number=1, repeat=20)) < 0.001


PLANTED = """
import os, subprocess, sys, threading, uuid
import pytest

KEPT = []

@pytest.fixture(scope="module")
def wide():
    yield
    if "module" in os.environ["PLANT"]:
        KEPT.append(os.memfd_create("wide"))

def test_clean(wide):
    os.close(os.memfd_create("fine"))

def test_thread():
    threading.Thread(target=threading.Event().wait, daemon=True, name="weed").start()

def test_process():
    KEPT.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

def test_descriptor():
    KEPT.append(os.memfd_create("weed"))

def test_shm():
    open("/dev/shm/" + os.environ["WEED"], "w").close()

@pytest.mark.leaves("on purpose")
def test_excused():
    KEPT.append(os.memfd_create("weed"))

@pytest.mark.leaves
def test_without_reason():
    pass
"""


def run_planted(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, plant: str, *select: str
) -> pytest.RunResult:
    """Run the planted tests under our conftest in an interpreter of their own, so that their leaks die with it."""
    folder = Path(__file__).parent
    pytester.makeconftest((folder / "conftest.py").read_text() + "\nimport leaks\nleaks.DEADLINE_SECONDS = 0.2\n")
    pytester.makepyfile(PLANTED)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PLANT", plant)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester.runpytest_subprocess("-rA", *select, timeout=60)


def test_the_fixture_fails_the_tests_that_leak(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    weed = Path("/dev/shm", f"weed-{uuid.uuid4().hex}")
    monkeypatch.setenv("WEED", weed.name)
    try:
        result = run_planted(pytester, monkeypatch, "")
    finally:
        weed.unlink(missing_ok=True)
    # Each leak is an error of its own test's teardown, after the test itself has passed.
    result.assert_outcomes(passed=6, errors=5)
    for name in ("thread", "process", "descriptor", "shm"):
        result.stdout.fnmatch_lines([f"*ERROR at teardown of test_{name}*", "this test left behind:", "  *"])
    result.stdout.fnmatch_lines(["*ERROR at setup of test_without_reason*", "*needs one argument: the reason*"])
    result.stdout.no_fnmatch_line("ERROR *test_clean*")
    result.stdout.no_fnmatch_line("ERROR *test_excused*")


def test_the_fixture_fails_the_module_whose_fixture_leaks(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_planted(pytester, monkeypatch, "module", "-k", "clean")
    result.assert_outcomes(passed=1, errors=1, deselected=6)
    result.stdout.fnmatch_lines(["*this module left behind:*", "*memfd:wide*"])


def test_a_child_of_ours_is_found_by_its_ancestors() -> None:
    child = python("input()", stdin=subprocess.PIPE)
    try:
        info = wait_until(lambda: process_info(child.pid), 5.0)
        assert info.parent == os.getpid()
    finally:
        child.communicate(b"\n")
