"""The actor of Ray that is a worker: ``TaskRunner`` in Ray's clothes.

Three concurrency groups of one thread each: tasks run in the default one; ``control`` answers while they run; ``life``
holds one call that is always pending, whose failure tells the pool that this worker is gone.
"""

from __future__ import annotations

import os
from typing import Any

from tpool.ray.tasks import Call, Hello, Reply, TaskRunner

__all__ = ["ActorBody", "actor_class"]


class ActorBody:
    """What Ray makes an actor of."""

    def __init__(self) -> None:
        self._runner = TaskRunner()

    def hello(self) -> tuple[int, str]:
        """This process, and its node."""
        import ray

        return os.getpid(), ray.get_runtime_context().get_node_id()

    def begin(self, hello: Hello, call: Call, *refs: Any) -> tuple[Reply, list[Any] | None]:
        """See TaskRunner."""
        return self._runner.begin(hello, call, refs)

    def run(self, call: Call, *refs: Any) -> tuple[Reply, list[Any] | None]:
        """See TaskRunner."""
        return self._runner.run(call, refs)

    def retire(self) -> str | None:
        """See TaskRunner."""
        return self._runner.retire()

    def recall(self, number: int) -> tuple[int, int]:
        """See TaskRunner."""
        return self._runner.recall(number)

    def stack(self) -> str:
        """See TaskRunner."""
        return self._runner.stack()

    def live(self) -> tuple[Reply, list[Any] | None]:
        """See TaskRunner; always pending, so that its failure tells of this worker's end."""
        return self._runner.live()


def actor_class(ray: Any) -> Any:
    """The class that Ray knows."""
    return ray.remote(concurrency_groups={"control": 1, "life": 1})(ActorBody)
