"""When somebody who waits for memory is told that there is none: a pure machine, with workers and a clock of ours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tpool.local import hunger
from tpool.local.hunger import HOPELESS_SECONDS, TRIM_SECONDS, Hunger


class Worker:
    """What ``Hunger`` knows of a member."""

    def __init__(self, *, starving=False, lent=False):
        self.starving = starving
        self.lent = lent
        self.ended = self.may_finish = self.trimming = False
        self.told = []

    def put_trim(self):
        self.trimming = True
        self.told.append("trim")

    def put_grant(self):
        self.told.append("grant")

    def put_hopeless(self):
        self.told.append("hopeless")


class Pool:
    """A pool's handler, which looks whenever the test says so."""

    def __init__(self, monkeypatch, callers):
        self.callers = callers
        self.now = 1000.0
        monkeypatch.setattr(hunger, "monotonic", lambda: self.now)
        self.hunger = Hunger(lambda: None)
        self.workers = []
        self.flushed = []
        self.reclaims = 0
        self.consumable = self.awaited = False

    def may_give_back(self):
        return self.consumable

    def awaits_earlier(self):
        return self.awaited

    def add(self, **state):
        self.workers.append(Worker(**state))
        return self.workers[-1]

    def look(self, seconds=0.0):
        self.now += seconds
        starving = {worker: None for worker in self.workers if worker.starving}
        return self.hunger.check(self.workers, starving, self, self.flushed.append, self.reclaimed)

    def reclaimed(self):
        self.reclaims += 1

    def wait(self):
        """In a thread of the caller's."""
        return self.callers.submit(self.hunger.wait, 0).result()

    def verdict(self, seconds=0.0):
        """What a caller's thread hears that has waited all the time."""
        self.now += seconds
        assert self.wait()
        assert self.look()
        return not self.wait()


@pytest.fixture
def pool(monkeypatch):
    with ThreadPoolExecutor(1) as callers:
        yield Pool(monkeypatch, callers)


def test_nobody_waits(pool):
    worker = pool.add()
    assert not pool.look()
    assert worker.told == []


def test_all_workers_are_asked_and_their_answers_awaited(pool):
    idle, starving = pool.add(), pool.add(starving=True)
    assert pool.look()
    assert idle.told == starving.told == ["trim"]
    assert pool.flushed == [idle, starving]
    idle.trimming = False
    pool.look(HOPELESS_SECONDS * 2)  # the other one may be about to find what it needs
    starving.trimming = False
    pool.look()
    pool.look(HOPELESS_SECONDS * 0.9)
    assert starving.told == ["trim"]
    pool.look(HOPELESS_SECONDS * 0.2)
    assert starving.told == ["trim", "hopeless"]
    assert idle.told == ["trim"]
    assert pool.reclaims == 1, "once, and not at every look"


def test_a_caller_is_told_after_the_answers(pool):
    worker = pool.add()
    assert not pool.verdict()
    assert worker.told == ["trim"]
    assert not pool.verdict(HOPELESS_SECONDS * 2)
    worker.trimming = False
    assert not pool.verdict()
    assert not pool.verdict(HOPELESS_SECONDS * 0.9)
    assert pool.verdict(HOPELESS_SECONDS * 0.2)
    assert worker.told == ["trim"]


def test_a_lent_worker_is_asked_when_it_is_back(pool):
    lent, idle = pool.add(lent=True), pool.add()
    for _ in range(3):
        assert not pool.verdict(HOPELESS_SECONDS * 2)
    assert lent.told == idle.told == []
    lent.lent = False
    assert not pool.verdict()
    assert lent.told == idle.told == ["trim"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_worker_that_never_answers(pool, gone):
    worker = pool.add()
    assert not pool.verdict()
    worker.ended = gone
    assert not pool.verdict(0 if gone else TRIM_SECONDS * 1.01)
    assert pool.verdict(HOPELESS_SECONDS * 1.1)


def test_a_task_that_runs_is_hope_and_all_are_asked_anew_after_it(pool):
    worker = pool.add()
    assert not pool.verdict()
    worker.trimming = False
    assert not pool.verdict()
    worker.may_finish = True
    assert not pool.verdict(HOPELESS_SECONDS * 2)
    worker.may_finish = False
    assert not pool.verdict()
    assert worker.told == ["trim", "trim"]


def test_one_that_has_not_answered_is_not_asked_twice(pool):
    worker = pool.add()
    assert not pool.verdict()
    worker.may_finish = True
    assert not pool.verdict()
    worker.may_finish = False
    assert not pool.verdict()
    assert worker.told == ["trim"]


def test_beyond_the_budget_for_an_earlier_result(pool):
    worker = pool.add(starving=True)
    pool.awaited = True
    pool.look()
    worker.trimming = False
    pool.look()
    pool.look(HOPELESS_SECONDS / 10)
    assert worker.told == ["trim", "grant"]


def test_a_consumer_that_may_drop_results_is_hope_for_workers_only(pool):
    worker = pool.add(starving=True)
    pool.consumable = True
    for _ in range(3):
        assert pool.look(HOPELESS_SECONDS * 2)
    assert worker.told == []
    assert not pool.verdict()
    assert worker.told == ["trim"]


def test_a_finalizer_in_the_handlers_thread_does_not_wait_for_what_only_that_brings(pool):
    worker = pool.add()
    assert not pool.look()
    pool.hunger.set_patience(lambda: True)
    assert not pool.hunger.wait(0)
    assert not pool.look(), "nobody waits"
    assert worker.told == []
