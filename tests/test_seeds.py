"""Random numbers that depend on the seed and the task alone; with real processes, through the public API."""

from __future__ import annotations

import pool_tasks as tasks
import pytest

import tpool

ITEMS = range(24)


def numbers_of(**options):
    """What each kind of call draws, in the same order of calls."""
    with tpool.Pool(**options) as pool:
        drawn = {
            "map": pool.map(tasks.draw, ITEMS, options.get("maxtasksperchild")),
            "starmap": pool.starmap(tasks.draw, [(item, 0) for item in ITEMS]),
            "imap": list(pool.imap(tasks.draw, ITEMS)),
            "istarmap": list(pool.istarmap(tasks.draw, [(item, 0) for item in ITEMS])),
            "apply": [pool.apply(tasks.draw) for _ in range(4)],
            "submit": [pool.submit(tasks.draw).result()],
        }
    return drawn


def test_the_same_whatever_the_workers_and_the_chunks():
    one = numbers_of(processes=1, seed=7)
    assert numbers_of(processes=3, seed=7) == one
    assert numbers_of(processes=2, seed=7, maxtasksperchild=5) == one
    other = numbers_of(processes=1, seed=8)
    for name, drawn in one.items():
        assert not set(drawn) & set(other[name])


def test_each_call_on_each_item_has_its_own():
    drawn = [numbers for part in numbers_of(processes=2, seed=0).values() for numbers in part]
    for source in range(3):
        assert len({numbers[source] for numbers in drawn}) == len(drawn)


def test_the_same_whatever_the_order_in_which_they_finish():
    with tpool.Pool(2, seed=7) as pool:
        first = set(pool.imap_unordered(tasks.draw, ITEMS))
    with tpool.Pool(2, seed=7) as pool:
        assert set(pool.map_unordered(tasks.draw, ITEMS)) == first


def test_the_same_after_retries(tmp_path):
    with tpool.Pool(2, seed=7, retries=2) as pool:
        drawn = pool.apply(tasks.draw_until, (str(tmp_path / "log"), 3))
    with tpool.Pool(2, seed=7) as pool:
        assert pool.apply(tasks.draw) == drawn


def test_an_input_that_cannot_be_iterated():
    with tpool.Pool(1, seed=7) as pool, pytest.raises(TypeError, match="not iterable"):
        next(pool.imap(tasks.draw, 5))


@pytest.mark.parametrize(("bad", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("7", TypeError)])
def test_bad_seeds(bad, kind):
    with pytest.raises(kind, match="seed must be"):
        tpool.Pool(1, seed=bad)
