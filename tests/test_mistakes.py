"""What users get wrong, each told in one message that names the cure; with real processes, through the public API.

Bad numbers for limits, threads, CPUs and devices: ``test_limits.py`` and ``test_steering.py``.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import queue
import threading
import time

import pool_tasks as tasks
import pytest
import torch

import tpool

DEADLINE = 30


@pytest.fixture
def pool():
    with tpool.Pool(2) as pool:
        yield pool


def ended(how):
    pool = tpool.Pool(1)
    getattr(pool, how)()
    pool.join()
    return pool


async def asynchronous(x):
    return x


def generating(x):
    yield x


class Job:
    """A class that keeps its pool, and sends a method of its own: the classic."""

    def __init__(self, pool):
        self.pool = pool

    def work(self, x):
        return x


def put_open_file(pool):
    with open(__file__) as file:
        pool.put(file)


# Of a pool ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"at least 1, not 0; leave it out for one a CPU", {"processes": 0}),
        (TypeError, r"processes must be a number of workers, or None for one a CPU, not '2'", {"processes": "2"}),
        (TypeError, r"not 2\.5$", {"processes": 2.5}),
        (TypeError, r"comes second, as in Pool\(None, initializer\)", {"processes": tasks.double}),
        (TypeError, r"initargs must be a tuple .* not 5; .* comma: \(5,\)", {"initializer": print, "initargs": 5}),
        (TypeError, r"not 'ab'; .* comma: \('ab',\)", {"initializer": print, "initargs": "ab"}),
        (TypeError, r"initializer must be a callable, or None, not None is.*initargs=", {"initializer": "None is"}),
        (ValueError, r"must be one of forkserver, fork, spawn, .* not 'forkserve'", {"context": "forkserve"}),
        (ValueError, r"must be one of forkserver, fork, spawn, .* not 5", {"context": 5}),
        (ValueError, r"memory 'lots' is not a size; .* such as '2GB'", {"memory": "lots"}),
        (ValueError, r"memory must be at least 1 MiB, not 512", {"memory": 512}),
        (ValueError, r"'cuda:O' is no device of torch; write 'cuda:0'", {"devices": ["cuda:O"]}),
        (TypeError, r"write \['json'\]", {"preload": "json"}),
        (ValueError, r"sharing must be 'share' or 'copy'", {"sharing": "none"}),
        (TypeError, r"retry_on must be a class of exceptions", {"retry_on": "OSError"}),
        (TypeError, r"seed must be an int or None, not '0'", {"seed": "0"}),
        (ValueError, r"maxtasksperchild must be a positive int or None", {"maxtasksperchild": 0}),
        (ValueError, r"forward_logs must be True, or a level such as 'INFO'", {"forward_logs": "LOUD"}),
    ],
)
def test_making_a_pool(error, message, arguments):
    if arguments.get("initializer") == "None is":
        message = message.replace("not None is", "not 'None is'")
    with pytest.raises(error, match=message):
        tpool.Pool(**{"processes": 1, **arguments})


# Of a call ----------------------------------------------------------------------------------------------------------


CALLS = {
    # what is called
    "a call in the place of a function": (
        TypeError, r"must be callable, not 6; give the function .* map\(f, xs\), not apply\(f\(x\)\)",
        lambda pool: pool.map(tasks.double(3), [1]),
    ),
    "None as a function": (TypeError, r"must be callable, not None", lambda pool: pool.submit(None)),
    "the items first": (
        TypeError, r"the function comes first, then .*; not \[1, 2\]", lambda pool: pool.imap([1, 2], tasks.double)
    ),
    "an async function": (
        TypeError, r"asynchronous is an async function, .*: return asyncio\.run\(asynchronous\(\*args\)\)",
        lambda pool: pool.apply(asynchronous, (1,)),
    ),
    "an async function in a partial": (
        TypeError, r"is an async function", lambda pool: pool.map(functools.partial(asynchronous), [1])
    ),
    "a generator function": (
        TypeError, r"generating is a generator function, .*: return list\(generating\(\*args\)\)",
        lambda pool: pool.apply_async(generating, (1,)),
    ),
    "no function for batches": (
        TypeError, r"must be callable", lambda pool: pool.map_batches(None, torch.ones(4), batch_size=2)
    ),
    # what it is called on
    "one argument without its comma": (
        TypeError, r"args must be a tuple .* not 5; a single one needs its comma: \(5,\)",
        lambda pool: pool.apply(tasks.double, 5),
    ),
    "text for arguments": (TypeError, r"comma: \('hello',\)", lambda pool: pool.apply_async(tasks.double, "hello")),
    "a tensor for arguments": (
        TypeError, r"not a tensor of shape \(3,\); a single one needs its comma: \(x,\)",
        lambda pool: pool.apply(tasks.double, torch.ones(3)),
    ),
    "a dict for arguments": (
        TypeError, r"not the dict \{'x': 1\}; keyword arguments: kwds=", lambda pool: pool.apply(dict, {"x": 1})
    ),
    "a list for keyword arguments": (
        TypeError, r"kwds must be a dict .* not \[1\]", lambda pool: pool.apply(dict, (), [1])
    ),
    "arguments one by one": (
        TypeError, r"callback must be a callable .* not 3; .* stand together in args",
        lambda pool: pool.apply_async(max, (1,), {}, 3),
    ),
    "a number to go through": (
        TypeError, r"must be an iterable, such as a list, not 5: .* apply\(func, \(item,\)\)",
        lambda pool: pool.map(tasks.double, 5),
    ),
    "a number to stream": (TypeError, r"must be an iterable", lambda pool: pool.imap_unordered(tasks.double, 5)),
    "items that are no tuples": (
        TypeError, r"argument after \* must be an iterable, not int", lambda pool: pool.starmap(tasks.double, [1, 2])
    ),
    "a generator where a tensor is due": (
        TypeError, r"data must be a dense tensor or a dict of such, not generator",
        lambda pool: pool.map_batches(tasks.double, (x for x in "ab"), batch_size=1),
    ),
    "a generator as an item": (
        TypeError, r"cannot pickle 'generator' object: send a list .* pool\.imap\(func, generator\)",
        lambda pool: pool.map(sum, [(x for x in [1, 2])]),
    ),
    # how
    "a negative chunksize": (
        ValueError, r"Chunksize must be 1\+, not -1; leave it out", lambda pool: pool.map(tasks.double, [1], -1)
    ),
    "a second iterable": (
        TypeError, r"for several iterables: starmap\(func, zip\(xs, ys\)\)", lambda pool: pool.map(pow, [1], [2])
    ),
    "text for a buffer": (
        TypeError, r"buffersize must be a number of items, .* in bytes: buffer_nbytes=",
        lambda pool: pool.imap(tasks.double, [1], buffersize="2GB"),
    ),
    "a negative time limit": (
        ValueError, r"timeout must be more than 0 seconds, or None for no limit, not -1",
        lambda pool: pool.apply(tasks.double, (1,), timeout=-1),
    ),
    "progress that cannot be shown": (
        TypeError, r"progress must be True, False or a callable that takes a tpool\.Progress, not 'bar'",
        lambda pool: pool.map(tasks.double, [1], progress="bar"),
    ),
    # what cannot travel
    "a lock": (
        TypeError, r"cannot pickle '_thread\.lock' object: .* in an initializer; .* to initargs",
        lambda pool: pool.apply(tasks.double, (threading.Lock(),)),
    ),
    "a lock among items": (
        TypeError, r"cannot pickle '_thread\.lock' object: ", lambda pool: pool.map(tasks.double, [threading.Lock()])
    ),
    "a lock of multiprocessing": (
        RuntimeError, r"through inheritance: give it to Pool\(initializer=.*, initargs=",
        lambda pool: pool.apply(tasks.double, (multiprocessing.Lock(),)),
    ),
    "a queue": (
        TypeError, r"'_queue\.SimpleQueue' object: .* a queue of multiprocessing to initargs",
        lambda pool: pool.submit(tasks.double, queue.SimpleQueue()).result(DEADLINE),
    ),
    "an open file to keep": (
        TypeError, r"cannot pickle '.*TextIOWrapper' .*: it lives in one process: make it in the task", put_open_file
    ),
    "a lock as a result": (
        tpool.MaybeEncodingError, r"cannot pickle .*_thread\.lock.* object: .* in an initializer",
        lambda pool: pool.apply(threading.Lock),
    ),
    "the pool": (
        NotImplementedError, r"have the caller make the calls", lambda pool: pool.apply(tasks.identity, (pool,))
    ),
    "a method of what has the pool": (
        NotImplementedError, r"a method sends its object, too: keep the pool out",
        lambda pool: pool.map(Job(pool).work, [1]),
    ),
    "a result": (
        tpool.TransportError, r"cannot leave its process: send the value, as in pool\.submit\(f, result\.get\(\)\)",
        lambda pool: pool.apply(tasks.identity, (pool.submit(tasks.double, 1),)),
    ),
    # when
    "after the with block": (
        tpool.PoolEndedError, r"it was terminated, which the end of its with block does, too; .* make another pool",
        lambda pool: ended("terminate").map(tasks.double, [1]),
    ),
    "after close": (
        tpool.PoolEndedError, r"it was closed; make the call before that",
        lambda pool: ended("close").submit(max, 1, 2),
    ),
    "join too soon": (ValueError, r"still running; call close\(\) before join\(\)", lambda pool: pool.join()),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_calling(pool, what):
    error, message, call = CALLS[what]
    with pytest.raises(error, match=message) as caught:
        call(pool)
    assert isinstance(caught.value, error)
    assert len(str(caught.value).splitlines()) == 1
    assert pool.apply(tasks.double, (1,)) == 2, "the pool is none the worse"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_tensor_without_cuda(pool):
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA") as caught:
        pool.apply(tasks.make_on, ("cuda",))
    assert "in make_on" in str(caught.value.__cause__), "it tells where"


def test_results_that_are_asked_for_after_the_with_block():
    with tpool.Pool(1) as pool:
        stream = pool.imap(tasks.sleep, [0, DEADLINE])
        assert next(stream) == 0
        result = pool.submit(time.sleep, DEADLINE)
    with pytest.raises(tpool.PoolTerminatedError, match=r"terminated before apply\(sleep\) had its result; ask"):
        result.get(DEADLINE)
    with pytest.raises(
        tpool.PoolTerminatedError, match=r"terminated before .* had its result; ask .* inside its with"
    ):
        next(stream)


def test_a_result_that_is_late(pool, tmp_path):
    result = pool.submit(tasks.wait_for_file, str(tmp_path / "gate"))
    message = r"apply\(wait_for_file\) has not finished within 0 s, and goes on: ask again later, or cancel\(\) it"
    with pytest.raises(multiprocessing.TimeoutError, match=message):
        result.get(0)
    (tmp_path / "gate").touch()
    result.get(DEADLINE)


def test_a_callback_that_waits_for_a_call_with_a_callback(pool):
    """All callbacks run in one thread: it would wait for ever for the inner one, which it is to run itself."""
    seen = []

    def outer(value):
        inner = pool.apply_async(tasks.double, (value,), callback=seen.append)
        seen.append(-inner.get(DEADLINE))
        seen.append(-sum(pool.map_async(tasks.double, [value], callback=seen.append).get(DEADLINE)))

    assert pool.apply_async(tasks.double, (2,), callback=outer).get(DEADLINE) == 4
    pool.apply_async(tasks.double, (0,), callback=seen.append).get(DEADLINE)
    assert seen == [-8, -8, 8, [8], 0]


def test_a_callback_that_asks_for_its_own_result(pool):
    seen, results = [], queue.SimpleQueue()
    result = pool.apply_async(tasks.double, (2,), callback=lambda _: seen.append(results.get().get(DEADLINE)))
    results.put(result)
    result.get(DEADLINE)
    pool.apply_async(tasks.double, (0,), callback=seen.append).get(DEADLINE)
    assert seen == [4, 0]


def test_asking_the_caller_which_worker_it_is(pool):
    assert tpool.get_worker_info() is None
    assert pool.apply(tpool.get_worker_info).num_workers == 2


def test_an_async_function_that_is_run(pool):
    """The cure that the message names."""
    assert pool.apply(lambda *args: asyncio.run(asynchronous(*args)), (3,)) == 3
