"""Calls in workers that are lent to callers; with real processes, through the public API where that reaches."""

from __future__ import annotations

import os
import signal
import threading

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool
from tpool.local.loans import Loan, Stage

DEADLINE = 30


@pytest.fixture
def pool():
    """A pool with one worker, which is lent after the first call."""
    with tpool.Pool(1) as pool:
        lend(pool)
        yield pool


def lend(pool) -> None:
    """Have the pool lend a worker. Callers notice nothing of it, so the pool is asked behind their back."""
    wait_until(lambda: pool.apply(tasks.identity, (1,)) and free(pool), DEADLINE)


def free(pool) -> list[Loan]:
    return [borrowed.loan for borrowed in pool._engine._lending.loans._free.values()]


@pytest.fixture
def direct_calls(monkeypatch):
    """The answers to calls that were made in lent workers."""
    answers = []
    call = Loan.call

    def noted(self, *args):
        answers.append(call(self, *args))
        return answers[-1]

    monkeypatch.setattr(Loan, "call", noted)
    return answers


def test_a_call_finds_the_lent_worker(pool, direct_calls):
    before = pool.stats().tasks_done
    assert pool.apply(tasks.double, (21,)) == 42
    assert pool.apply(lambda x: x + 1, (1,)) == 2
    assert len(direct_calls) == 2
    assert pool.stats().tasks_done == before + 2


def test_memory_in_the_garbage_of_a_lent_worker():
    """The handler cannot ask it before it is back."""
    with tpool.Pool(1, memory="64MB") as pool:
        for _ in range(2):  # 20 MB each
            pool.apply(tasks.leave_in_cycle, (5_000_000,))
        lend(pool)
        assert pool.apply(len, (torch.ones(14_000_000),)) == 14_000_000


def test_others_get_the_worker_back(pool, direct_calls):
    assert pool.map(tasks.double, range(10)) == [2 * x for x in range(10)]
    assert pool.apply_async(tasks.double, (4,)).get(DEADLINE) == 8
    assert list(pool.imap(tasks.double, range(3))) == [0, 2, 4]
    lend(pool)
    before = len(direct_calls)
    assert pool.apply(tasks.double, (5,)) == 10
    assert len(direct_calls) == before + 1


def test_an_exception_of_the_task(pool):
    with pytest.raises(ValueError, match="a story") as caught:
        pool.apply(tasks.raise_exception, (ValueError("a story"),))
    assert "raise_exception" in str(caught.value.__cause__)
    assert pool.apply(tasks.double, (1,)) == 2


def test_tensors_go_the_other_way_and_come_back_right(pool):
    assert float(pool.apply(tasks.make_tensor, (2.0, 400_000)).sum()) == 200_000  # a result that is not plain
    lend(pool)
    assert bool((pool.apply(tasks.double, (torch.ones(1000),)) == 2).all())  # nor is this argument
    lend(pool)
    with pytest.raises(tpool.MaybeEncodingError):
        pool.apply(tasks.return_unpicklable)
    assert pool.apply(tasks.double, (1,)) == 2


def test_the_worker_dies_in_the_call(pool):
    with pytest.raises(tpool.WorkerLostError, match="SIGKILL while it ran task 0 of apply"):
        pool.apply(tasks.kill_self)
    assert pool.stats().workers_lost == 1
    assert pool.apply(tasks.double, (1,)) == 2


def test_the_worker_dies_while_nobody_calls(pool):
    pid = pool.apply(os.getpid)
    lend(pool)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), DEADLINE)
    assert pool.apply(tasks.double, (1,)) == 2


def test_a_stopped_worker_holds_only_its_caller_up():
    with tpool.Pool(2) as pool:
        lend(pool)
        pid = pool.apply(os.getpid)
        os.kill(pid, signal.SIGSTOP)
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(pool.apply(tasks.double, (1,))))
        thread.start()
        assert pool.map(tasks.double, range(20), chunksize=1) == [2 * x for x in range(20)]
        os.kill(pid, signal.SIGCONT)
        thread.join(DEADLINE)
        assert outcome == [2]


def test_many_threads_share_what_is_lent():
    with tpool.Pool(2) as pool:
        failures = []

        def use(number):
            try:
                for i in range(100):
                    assert pool.apply(tasks.double, (number * 1000 + i,)) == 2 * (number * 1000 + i)
                    if i % 20 == number:
                        assert pool.map(tasks.double, range(5)) == [0, 2, 4, 6, 8]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * DEADLINE)
        assert not failures


# The end ----------------------------------------------------------------------------------------------------------


def in_thread(pool, *call):
    outcome = []

    def run():
        try:
            outcome.append(pool.apply(*call))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_terminate_ends_a_call(tmp_path):
    with tpool.Pool(1) as pool:
        lend(pool)
        seen = tmp_path / "pid"
        thread, outcome = in_thread(pool, tasks.tell_pid_and_hang, (str(seen),))
        wait_until(lambda: seen.exists() and seen.read_text(), DEADLINE)
    thread.join(DEADLINE)
    assert isinstance(outcome[0], tpool.PoolTerminatedError)


def test_close_waits_for_a_call(tmp_path):
    path = str(tmp_path / "go")
    os.mkfifo(path)
    pool = tpool.Pool(1)
    lend(pool)
    thread, outcome = in_thread(pool, tasks.open_if_path, (path,))
    wait_until(lambda: not free(pool), DEADLINE)
    pool.close()
    with open(path, "w"):
        pool.join()
    thread.join(DEADLINE)
    assert outcome == [path]


def test_a_signal_handler_may_terminate_the_pool_in_a_call(tmp_path):
    """The call is suspended below the handler: nothing must wait for it."""
    pool = tpool.Pool(1)
    lend(pool)
    seen = tmp_path / "pid"

    def end(*_):
        pool.terminate()

    before = signal.signal(signal.SIGUSR1, end)
    main = threading.main_thread().ident

    def strike():
        wait_until(lambda: seen.exists() and seen.read_text(), DEADLINE)
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        with pytest.raises(tpool.PoolTerminatedError):
            pool.apply(tasks.tell_pid_and_hang, (str(seen),))
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join(DEADLINE)


# Interruptions ----------------------------------------------------------------------------------------------------


class Interruption(BaseException):
    """As a KeyboardInterrupt, which would end the tests."""


def test_an_interrupted_call_runs_on_and_the_worker_comes_back(pool, tmp_path):
    path = str(tmp_path / "go")
    os.mkfifo(path)
    pid = pool.apply(os.getpid)
    lend(pool)
    main = threading.main_thread().ident

    def interrupt(*_):
        raise Interruption

    before = signal.signal(signal.SIGUSR1, interrupt)

    def strike():
        wait_until(lambda: any(loan.stage is Stage.WAITING for loan in pool._engine._lending._lent.values()), DEADLINE)
        # It may not have reached its system call yet; then it is interrupted just before, which is a case, too.
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        with pytest.raises(Interruption):
            pool.apply(tasks.open_if_path, (path,))
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join(DEADLINE)
    waiting = pool.apply_async(os.getpid)
    with open(path, "w"):
        assert waiting.get(DEADLINE) == pid  # the same worker, once it had finished


@pytest.mark.parametrize("target", ["put_call", "plain_answer"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wherever_a_call_is_interrupted_the_pool_goes_on(monkeypatch, target, when):
    with tpool.Pool(1) as pool:
        lend(pool)
        member = free(pool)[0].member
        original = getattr(type(member), target)

        def interrupted(self, *args):
            if when == "after":
                original(self, *args)
            raise Interruption

        with monkeypatch.context() as patch:
            patch.setattr(type(member), target, interrupted)
            with pytest.raises(Interruption):
                pool.apply(tasks.double, (1,))
        assert pool.apply_async(tasks.double, (2,)).get(DEADLINE) == 4
        lend(pool)
        assert pool.apply(tasks.double, (3,)) == 6


def test_a_loan_lost_between_two_hands_comes_back(pool):
    assert pool._engine._lending.loans.borrow() is not None  # lost at once, as by a signal
    assert pool.apply_async(tasks.double, (2,)).get(DEADLINE) == 4


def test_a_loan_that_is_held_while_workers_are_wanted_is_handed_over(pool):
    borrowed = pool._engine._lending.loans.borrow()
    result = pool.apply_async(tasks.double, (2,))
    wait_until(lambda: pool._engine._lending.loans.pressing, DEADLINE)
    assert not result.ready()
    pool._engine._lending.loans.give_back(borrowed)
    assert result.get(DEADLINE) == 4


def test_a_borrower_who_sees_the_end_sees_the_answer(pool, monkeypatch):
    """Else it would take the call for one that never started, and have it made again."""
    seen = []

    class Watched(Loan):
        @property
        def ended(self):
            return bool(seen)

        @ended.setter
        def ended(self, value):
            if value:
                seen.append((self.answer, self.orphaned))

    lending = pool._engine._lending
    (loan,) = free(pool)
    borrowed = lending.loans.borrow()
    monkeypatch.setattr(loan, "__class__", Watched)
    os.kill(loan.member.pid, signal.SIGKILL)
    wait_until(lambda: seen, DEADLINE)
    answer, orphaned = seen[0]
    assert answer.exitcode == -signal.SIGKILL
    assert orphaned
    del borrowed, loan
