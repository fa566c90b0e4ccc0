"""CPython's own Pool tests pass with our pool, under every start method.

How they are found and bound is told in ``cpython_support``. Of those that cannot run with another pool than the
standard library's, the twins stand below: the same promise, tested by what a user can see.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from cpython_support import FORK_BESIDE_THREADS, LEFT_OUT, START_METHODS, load_cpython_tests, pool_cases, pool_tests
from methods import SELDOM_SPAWN
from support import run_script

from tpool import Pool

pytestmark = [pytest.mark.timeout(90), FORK_BESIDE_THREADS]

CPYTHON, MISSING = load_cpython_tests()
CASES: dict[str, dict[str, type]] = {
    method: pool_cases(CPYTHON, method, __name__) if CPYTHON else {} for method in START_METHODS
}
for cases in CASES.values():
    globals().update(cases)

DEADLINE = 60.0

# Those that start many interpreters, which takes half a minute, are spawned only when asked for.
SELDOM_SPAWNED = pytest.mark.parametrize("start_method", SELDOM_SPAWN)


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_cpython_tests_are_found(start_method: str) -> None:
    """Lest we run nothing and call it passed."""
    if CPYTHON is None:
        pytest.skip(MISSING)
    found = pool_tests(CPYTHON)
    assert {"_TestPool", "_TestPoolWorkerErrors", "_TestPoolWorkerLifetime", "TestInitializers"} <= found.keys()
    assert sum(entry.test in found.get(entry.case, ()) for entry in LEFT_OUT) >= 6
    run = CASES[start_method].values()
    assert {"TestPool", "TestPoolWorkerErrors", "TestPoolWorkerLifetime", "TestInitializers"} <= {
        title.partition("Processes")[0] for title in CASES[start_method]
    }
    assert sum(callable(getattr(case, name)) for case in run for name in dir(case) if name.startswith("test")) >= 25


def test_each_left_out_test_has_its_twin() -> None:
    for entry in LEFT_OUT:
        assert callable(globals()[entry.twin]), entry
        assert entry.reason


# Twins of what is left out ----------------------------------------------------------------------------------------

_barrier: Barrier | None = None


def _set_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _meet(_: int) -> int:
    """Wait until as many workers as the barrier counts are here at once."""
    assert _barrier is not None
    _barrier.wait(DEADLINE)
    return os.getpid()


def _pool_in_process(start_method: str) -> None:
    pool = Pool(4, context=start_method)
    powers = pool.starmap(pow, [(i, 2) for i in range(7)])
    pool.close()
    pool.join()
    assert powers == [i**2 for i in range(7)]


@pytest.mark.parametrize("processes", [-1, 0])
def test_make_pool_refuses_a_size_below_one(processes: int, start_method: str) -> None:
    with pytest.raises(ValueError, match="1"):
        Pool(processes, context=start_method)


def test_make_pool(start_method: str) -> None:
    """A pool of three has three workers: three tasks meet, each in a process of its own."""
    barrier = get_context(start_method).Barrier(3)
    with Pool(3, _set_barrier, (barrier,), context=start_method) as pool:
        assert len(set(pool.map(_meet, range(3), chunksize=1))) == 3
    pool.join()


def _drop(pools: list[Pool]) -> None:
    pools.clear()
    gc.collect()


def test_resource_warning(start_method: str) -> None:
    """A pool that is dropped while it runs warns, and what it had goes away all the same."""
    pools = [Pool(1, context=start_method)]
    assert pools[0].apply(pow, (3, 2)) == 9
    with pytest.warns(ResourceWarning, match="unclosed running"):
        _drop(pools)


def test_no_resource_warning_after_the_end(start_method: str) -> None:
    pools = [Pool(1, context=start_method)]
    pools[0].terminate()
    pools[0].join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _drop(pools)


@SELDOM_SPAWNED
def test_pool_worker_lifetime(start_method: str) -> None:
    """No worker runs more tasks than it may; others come in its place and no result is lost."""
    with Pool(3, maxtasksperchild=4, context=start_method) as pool:
        pids = [pool.apply_async(os.getpid) for _ in range(10)]
        squares = [pool.apply_async(pow, (i, 2)) for i in range(10)]
        assert [result.get(DEADLINE) for result in squares] == [i**2 for i in range(10)]
        tasks = Counter(result.get(DEADLINE) for result in pids)
        pool.close()
        pool.join()
    assert max(tasks.values()) <= 4
    assert len(tasks) >= 3, "ten tasks, at most four for each"
    assert os.getpid() not in tasks


def test_pool_left_to_the_exit_of_its_script(start_method: str) -> None:
    """A running pool that a global still refers to at the interpreter's exit neither hangs nor fails it."""
    source = """
        import sys
        from tpool import Pool

        problem = None

        class A:
            def __init__(self):
                self.pool = Pool(processes=1, context=sys.argv[1])

        def test():
            global problem
            problem = A()
            print(problem.pool.map(float, tuple(range(3))))

        if __name__ == "__main__":
            test()
    """
    assert run_script(source, DEADLINE, args=[start_method]).expect_success().stdout == "[0.0, 1.0, 2.0]\n"


def test_pool_that_cannot_start_leaves_nothing(start_method: str) -> None:
    """Out of descriptors half-way through its workers, a pool raises and gives back all that it had."""
    source = """
        import resource, sys
        from leaks import Snapshot, find_leaks
        from tpool import Pool, TpoolError

        def start(processes):
            with Pool(processes, context=sys.argv[1]) as pool:
                pool.map(float, range(processes), chunksize=1)
            pool.join()

        if __name__ == "__main__":
            start(1)  # whatever is opened once for the whole process is open now
            before = Snapshot.take()
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(fd for fd, _ in before.descriptors)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
            try:
                start(60)
            except (OSError, TpoolError) as error:
                print("raised", type(error).__name__, file=sys.stderr)
            else:
                print("started 60 workers with 20 descriptors")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            print(find_leaks(before))
            start(1)  # and the next pool is as good as the first
    """
    assert run_script(source, DEADLINE, args=[start_method]).expect_success().stdout == "[]\n"


@SELDOM_SPAWNED
def test_pool_in_process(start_method: str) -> None:
    """A process that a program starts can have a pool of its own."""
    process = get_context(start_method).Process(target=_pool_in_process, args=(start_method,))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 0
    process.close()


def test_large_pool() -> None:
    """Two hundred workers are no more than a number."""
    source = """
        from tpool import Pool

        def f(x): return x*x

        if __name__ == "__main__":
            with Pool(200) as p:
                print(sum(p.map(f, range(1000))))
    """
    result = run_script(source, DEADLINE).expect_success()
    assert result.stdout == "332833500\n"
    assert result.stderr == ""
