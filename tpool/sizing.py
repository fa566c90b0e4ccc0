"""The public call that makes a pool larger or smaller: a part of ``Pool``."""

from __future__ import annotations

from tpool import options
from tpool.engine import Engine
from tpool.gate import Gate
from tpool.handler import Handler
from tpool.messages import Resized

__all__ = ["Sized"]


class Sized:
    """``resize``. Pools have this method; nothing else does."""

    _engine: Engine
    _gate: Gate
    _handler: Handler

    def resize(self, processes: int) -> None:
        """Have so many workers from now on; returns at once. From any thread, also while calls are under way.

        Growing starts the new workers in the background; they run the initializer. Shrinking retires workers: idle
        ones at once, others when the task that they run is done; tasks that were sent to them and not begun go back
        to their place in the queue. ``worker_exit`` runs as ever. Nothing is lost, and results keep their order.

        >>> with tpool.Pool(1) as pool:
        ...     results = pool.imap(abs, range(-4, 0))
        ...     pool.resize(2)
        ...     list(results)
        [4, 3, 2, 1]

        A worker keeps its id, its CPUs and its device, which go by its place in the pool: after a shrink the ids that
        are left may have gaps, and a pool that grows again fills the lowest first. ``num_workers`` in
        ``get_worker_info()``, and the share of the CPUs that ``threads=None`` stands for, are those of the moment in
        which the worker started. A default ``chunksize`` is that of the moment of the call; a stream that is under way
        draws its input for the new number at once. ``stats()`` goes on telling of the places that are left; results
        that came from there stay valid, and only what nothing uses is given back.

        Args:
            processes: at least 1.

        Raises:
            TypeError: it is no number.
            ValueError: it is less than 1, or more than the pool has room for.
            PoolEndedError: the pool takes no more work.
            PlatformError: there are not enough descriptors, or is not enough address space; nothing has changed.
        """
        options.check_new_size(processes)
        gate = self._gate
        with gate.lock:
            gate.check_running()
            self._engine.make_room(processes)
            gate.processes = processes
            self._handler.post(Resized(processes))
