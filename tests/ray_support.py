"""What the tests on Ray share: a Ray of their own, and a look at what a pool has left there.

Ray keeps threads, connections and idle processes for as long as it is connected, so these tests do without the check
of every test for leaks (``leaves``) and look for what is tpool's: actors and threads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support import process_info, processes, wait_until

from tpool.ray.cluster import on_loopback

__all__ = ["REASON", "actor_pids", "expect_nothing_left", "started_ray"]

REASON = "Ray keeps threads, connections and idle processes as long as it is connected; what is tpool's is looked for"
DEADLINE = 60.0


@contextmanager
def started_ray() -> Iterator[Any]:
    """Start a cluster of one node on the loopback interface, and stop it; gives the ``Cluster``, which can grow."""
    import ray
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "object_store_memory": 400 << 20, "include_dashboard": False}
    with on_loopback():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        reset_ray_address()  # or others on this machine would find it
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def actor_pids() -> set[int]:
    """Processes of this machine that descend from us and are workers of a pool on Ray."""
    found = set()
    for info in processes():
        if info.alive and info.command().startswith("ray::ActorBody") and _is_ours(info.parent):
            found.add(info.pid)
    return found


def _is_ours(raylet: int) -> bool:
    info = process_info(raylet)
    while info is not None and info.pid > 1:
        if info.pid == os.getpid():
            return True
        info = process_info(info.parent)
    return False


def expect_nothing_left(threads: set[threading.Thread], actors: frozenset[int] | set[int] = frozenset()) -> None:
    """Assert that actors and threads of pools are gone.

    Args:
        threads: those that there were before.
        actors: likewise.
    """

    def left() -> list[str]:
        names = [thread.name for thread in threading.enumerate() if thread not in threads]
        return [name for name in names if name.startswith("tpool")] + [f"actor {pid}" for pid in actor_pids() - actors]

    try:
        wait_until(lambda: not left(), DEADLINE)
    except AssertionError:
        raise AssertionError(f"left behind: {left()}") from None
