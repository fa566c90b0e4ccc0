"""A pool on several nodes of Ray: work spreads, a node is killed in the middle of a map, another is added."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from ray_support import REASON, expect_nothing_left, on_loopback
from support import wait_until

import tpool

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.leaves(REASON), pytest.mark.timeout(200)]

DEADLINE = 90
TASKS = 2_000
# Of our nodes alone, so that the test run's own one stays out of it.
ISLAND = tpool.RayEngine(num_cpus=0, resources={"island": 1})


def add_node(cluster: Any) -> Any:
    """A node with room for two workers."""
    with on_loopback():
        return cluster.add_node(num_cpus=1, resources={"island": 2}, object_store_memory=80 << 20)


def where(number: int) -> tuple[int, str]:
    """Take a few milliseconds, so that each task travels alone; say on which node."""
    import ray

    time.sleep(0.005)
    return number, ray.get_runtime_context().get_node_id()


def kill(node: Any, cluster: Any) -> None:
    """The machine stops, as far as Ray can tell: no process of the node gets to say anything."""
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    cluster.worker_nodes.discard(node)


@pytest.fixture
def nodes(ray_cluster: Any) -> Iterator[list[Any]]:
    """Two nodes; removed at the end, and what a test has put in their place."""
    threads = set(threading.enumerate())
    nodes = [add_node(ray_cluster) for _ in range(2)]
    yield nodes
    expect_nothing_left(threads)
    for node in nodes:
        ray_cluster.remove_node(node)


def test_a_node_is_killed_in_the_middle_of_a_map_and_another_is_added(ray_cluster: Any, nodes: list[Any]) -> None:
    with tpool.Pool(4, engine=ISLAND) as pool:
        wait_until(lambda: len({node for _, node in pool.map(where, range(16), chunksize=1)}) == 2, DEADLINE)
        results = [pool.apply_async(where, (number,)) for number in range(TASKS)]
        results[TASKS // 4].wait(DEADLINE)
        kill(nodes.pop(), ray_cluster)
        outcomes = [result.exception(DEADLINE) for result in results]
        lost = [number for number, error in enumerate(outcomes) if error is not None]
        assert all(isinstance(outcomes[number], tpool.WorkerLostError) for number in lost)
        assert 1 <= len(lost) <= 2, "two workers were there, each with one task"
        arrived = [result.get()[0] for number, result in enumerate(results) if outcomes[number] is None]
        assert arrived == [number for number in range(TASKS) if number not in lost]

        # A new node is used, by the workers that had no place.
        nodes.append(add_node(ray_cluster))
        wait_until(lambda: len({node for _, node in pool.map(where, range(64), chunksize=1)}) == 2, DEADLINE)


@pytest.mark.slow
def test_with_retries_a_killed_node_costs_nothing(ray_cluster: Any, nodes: list[Any]) -> None:
    with tpool.Pool(4, engine=ISLAND) as pool:
        wait_until(lambda: len({node for _, node in pool.map(where, range(16), chunksize=1)}) == 2, DEADLINE)
        mapped = pool.imap_unordered(where, range(TASKS), retries=2)
        seen = [next(mapped) for _ in range(TASKS // 4)]
        kill(nodes.pop(), ray_cluster)
        seen += list(mapped)
        assert sorted(number for number, _ in seen) == list(range(TASKS))
        shares = Counter(node for _, node in seen[: TASKS // 4])
        assert min(shares.values()) > TASKS // 16, f"work did not spread: {shares}"
