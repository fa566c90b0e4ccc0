"""The places of a pool: how many it keeps, who is in them, and who is to leave.

A part of the scheduler, and as pure. A slot that the pool *keeps* has one worker, and gets another one when that is
gone. A pool that grows keeps more slots; one that shrinks keeps fewer, and the workers of the others *leave*: they are
sent nothing more, what they have not started is taken back, and they retire when they hold nothing::

    kept ─resize, fewer─► leaving ─holds nothing: RetireWorker─► RETIRING ─exited─► (gone; VacateSlot)
      ▲                      │
      └────resize, more──────┘

Who goes first: whoever leaves anyway, then the idle, then those that start, then those that are lent, then the busy;
of equals the one in the highest slot. Who comes back first: whoever was to leave and was not told yet, then empty
slots, the lowest first; a slot whose worker is retiring gets the next one when that is gone. So no slot is numbered
above the most that the pool ever kept.

Invariants (:meth:`Slots.check`): no two workers share a slot; each slot that is kept has a worker; a worker in another
slot is leaving or retiring or killed.
"""

from __future__ import annotations

from tpool.dispatch import Dispatcher
from tpool.errors import ProtocolError
from tpool.messages import StartWorker, VacateSlot
from tpool.roster import Worker, WorkerState
from tpool.task import Slot, WorkerId

__all__ = ["Slots"]

_GOING = (WorkerState.RETIRING, WorkerState.KILLED)
_RANKS = {WorkerState.RETIRING: 0, WorkerState.KILLED: 0, WorkerState.STARTING: 2, WorkerState.LENT: 3}
_IDLE, _BUSY = 1, 4


class Slots:
    """The places of one pool, and all its workers.

    Args:
        processes: how many are kept at first.
        dispatcher: is told who may be sent something no longer, or again.

    Attributes:
        workers: all there are, by id.
    """

    def __init__(self, processes: int, dispatcher: Dispatcher) -> None:
        self.workers: dict[WorkerId, Worker] = {}
        self._dispatcher = dispatcher
        self._kept = {Slot(slot) for slot in range(processes)}
        self._leaving: dict[Worker, None] = {}  # an ordered set: of those that are not kept, who was not told yet
        self._next_worker = 0

    @property
    def used(self) -> bool:
        """Whether there ever was a worker."""
        return self._next_worker > 0

    @property
    def awaits_lent(self) -> bool:
        """Whether somebody who is to leave is lent."""
        return bool(self._leaving) and any(worker.state is WorkerState.LENT for worker in self._leaving)

    def get(self, worker_id: WorkerId, story: str) -> Worker:
        """The worker of that id; a ProtocolError tells the story if there is none."""
        worker = self.workers.get(worker_id)
        if worker is None:
            raise ProtocolError(f"worker {worker_id} {story}, but it is gone or was never started")
        return worker

    def start_all(self) -> None:
        """A worker for each slot."""
        for slot in sorted(self._kept):
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        worker = Worker(WorkerId(self._next_worker), slot)
        self._next_worker += 1
        self.workers[worker.id] = worker
        self._dispatcher.out.append(StartWorker(worker.id, slot))

    def remove(self, worker: Worker) -> None:
        """It is gone."""
        del self.workers[worker.id]
        self._leaving.pop(worker, None)
        self._dispatcher.withdraw(worker)

    def refill(self, slot: Slot) -> None:
        """The worker of this slot is gone: the next one, if the slot is kept."""
        if slot in self._kept:
            self._start(slot)
        else:
            self._dispatcher.out.append(VacateSlot(slot))

    # Growing and shrinking ----------------------------------------------------------------------------------------

    def resize(self, processes: int) -> None:
        """Keep so many slots."""
        missing = processes - len(self._kept)
        if missing < 0:
            for worker in sorted(self._of_kept(), key=_rank)[:-missing]:
                self._let_go(worker)
        while len(self._kept) < processes and self._leaving:
            self._keep_on(next(reversed(self._leaving)))
        if len(self._kept) < processes:
            self._fill(processes)

    def _of_kept(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.slot in self._kept]

    def _let_go(self, worker: Worker) -> None:
        self._kept.remove(worker.slot)
        if worker.state in _GOING:
            return
        worker.leaving = True
        self._leaving[worker] = None
        dispatcher = self._dispatcher
        if worker.state is WorkerState.READY and worker.load > 1 and not worker.recalled:
            dispatcher.ask_back(worker)
        else:
            dispatcher.place(worker)
        if worker.state in _GOING:
            del self._leaving[worker]

    def _keep_on(self, worker: Worker) -> None:
        """It was to leave, and may stay."""
        del self._leaving[worker]
        if worker.state in _GOING:
            return  # It has been told meanwhile.
        worker.leaving = False
        self._kept.add(worker.slot)
        self._dispatcher.place(worker)

    def _fill(self, processes: int) -> None:
        taken = {worker.slot for worker in self.workers.values()}
        free = [Slot(slot) for slot in range(processes) if slot not in self._kept]
        free.sort(key=lambda slot: (slot in taken, slot))
        for slot in free[: processes - len(self._kept)]:
            self._kept.add(slot)
            if slot not in taken:
                self._start(slot)

    def check(self) -> None:
        """Assert the invariants, of a pool that is not over. For tests."""
        slots = [worker.slot for worker in self.workers.values()]
        assert len(set(slots)) == len(slots), "two workers share a slot"
        assert self._kept <= set(slots), "a slot has no worker"
        for worker in self.workers.values():
            if worker.slot in self._kept:
                assert not worker.leaving or worker.state in _GOING, "it leaves a slot that is kept"
            else:
                assert worker.leaving or worker.state in _GOING, "more workers than the pool should have"


def _rank(worker: Worker) -> tuple[int, int]:
    """Who goes first when the pool shrinks has the lowest."""
    rank = _RANKS.get(worker.state, _BUSY)
    if worker.state is WorkerState.READY and not worker.held:
        rank = _IDLE
    return rank, -worker.slot
