"""Looking before sleeping, where that has paid off: with a clock and a descriptor of the test's own, and real ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from support import wait_until

import tpool
from tpool.local import patience as module
from tpool.local.patience import LOOK_SECONDS, MAX_PASSES, SOON_SECONDS, Patience

LOOK, SLEEP = "look", "sleep"
SHORT, LONG = SOON_SECONDS / 2, SOON_SECONDS * 2


class World:
    """A clock, and a descriptor that becomes readable so many seconds after somebody begins to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: tuple[int, int]) -> None:
        self.now = 100.0
        self.due = 0.0
        self.did: list[str] = []
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        self.patience = Patience(ends[0])
        self.patience._poll = self.poll  # type: ignore[method-assign, assignment]

    def poll(self, milliseconds: float | None = None) -> list[int]:
        if milliseconds == 0:
            self.did.append(LOOK)
            self.now += LOOK_SECONDS / 10
            return [1] if self.now >= self.due else []
        self.did.append(SLEEP)
        self.now = max(self.now, self.due)
        return [1]

    def wait(self, seconds: float) -> list[str]:
        """Wait for something that comes after so many seconds; gives what was done, without repetitions."""
        self.due = self.now + seconds
        self.did = []
        self.patience.wait()
        assert self.now >= self.due, "it returned before there was anything"
        return list(dict.fromkeys(self.did))


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, ends: tuple[int, int]) -> World:
    return World(monkeypatch, ends)


def test_who_waits_long_never_looks(world: World) -> None:
    assert all(world.wait(LONG) == [SLEEP] for _ in range(1000))


def test_a_short_sleep_is_the_last(world: World) -> None:
    assert world.wait(SHORT) == [SLEEP]
    assert all(world.wait(LOOK_SECONDS / 2) == [LOOK] for _ in range(100))


def test_a_vain_look_ends_in_sleep_and_so_do_ever_more_after_it(world: World) -> None:
    world.wait(SHORT)
    distances, since = [], 0
    for _ in range(2000):
        did = world.wait(SHORT)  # longer than a look
        assert did[-1] == SLEEP
        since += 1
        if LOOK in did:
            distances.append(since)
            since = 0
    assert distances[:5] == [1, 3, 7, 15, 31]
    assert max(distances) == MAX_PASSES


def test_one_look_that_pays_off_and_it_is_as_patient_as_ever(world: World) -> None:
    world.wait(SHORT)
    for _ in range(3):
        while LOOK not in world.wait(SHORT):
            pass
    while LOOK not in world.wait(LOOK_SECONDS / 2):
        pass
    assert world.wait(LOOK_SECONDS / 2) == [LOOK]
    assert world.wait(LONG) == [LOOK, SLEEP]
    assert world.wait(SHORT) == [SLEEP]
    assert world.wait(LOOK_SECONDS / 2) == [LOOK]


def test_it_wakes_for_a_real_descriptor(ends: tuple[int, int]) -> None:
    patience = Patience(ends[0])
    assert not patience.wait_for(0.0)
    for _ in range(200):  # asleep, and looking
        threading.Timer(0.0, os.write, (ends[1], b"x")).start()
        patience.wait()
        assert os.read(ends[0], 1) == b"x"
    os.write(ends[1], b"x")
    assert patience.wait_for(10.0)


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def test_a_pool_that_was_busy_comes_to_rest() -> None:
    with tpool.Pool(1) as pool:
        pid = pool.apply(os.getpid)
        for _ in range(300):
            pool.apply(os.getpid)  # by now both ends look before they sleep
        wait_until(lambda: came_to_rest(pid), 30, "the worker uses no processor time")


def came_to_rest(pid: int) -> bool:
    before = processor_seconds(pid)
    threading.Event().wait(0.3)  # a stretch of time to measure, not something to wait for
    return processor_seconds(pid) - before < 0.001
