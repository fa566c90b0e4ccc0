"""The actor of Ray that is a worker: ``TaskRunner`` in Ray's clothes.

Three concurrency groups of one thread each: tasks run in the default one; ``control`` answers while they run; ``life``
holds one call that is always pending, whose failure tells the pool that this worker is gone.

The class is made inside a function, so that it travels by value: a process of Ray's can then say that it is there
before it imports torch, and waiting for resources can be told from a start that takes its time.
"""

from __future__ import annotations

import os
import threading
from typing import Any

__all__ = ["actor_class"]


def actor_class(ray: Any) -> Any:
    """The class that Ray makes actors of."""

    class ActorBody:
        """One worker; its methods are ``TaskRunner``'s, but for ``hello``."""

        def __init__(self) -> None:
            self._runner: Any = None
            self._begun = threading.Event()

        def hello(self) -> tuple[int, str]:
            import ray

            return os.getpid(), ray.get_runtime_context().get_node_id()

        def begin(self, hello: Any, call: Any, *refs: Any) -> Any:
            from tpool.ray.tasks import TaskRunner

            self._runner = TaskRunner()
            self._begun.set()
            return self._runner.begin(hello, call, refs)

        def run(self, call: Any, *refs: Any) -> Any:
            return self._runner.run(call, refs)

        def retire(self) -> str | None:
            told: str | None = self._runner.retire()
            return told

        def recall(self, number: int) -> Any:
            return self._runner.recall(number)

        def stack(self) -> str:
            return str(self._runner.stack()) if self._begun.is_set() else "it is starting"

        def live(self) -> Any:
            self._begun.wait()
            return self._runner.live()

    return ray.remote(concurrency_groups={"control": 1, "life": 1})(ActorBody)
