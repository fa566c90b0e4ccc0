"""Who runs what, since when: read from a pool that goes on working, and put into words.

What is read here changes meanwhile; it is for people. Everything is copied in single steps, so nothing can be torn.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from time import monotonic

from tpool import failures
from tpool.engine import Look
from tpool.handler import Handler
from tpool.roster import Worker, WorkerState
from tpool.stats import PoolStats, WorkerStats

__all__ = ["Doing", "collect_stats", "doings", "html_table", "text_report"]

_STATES = {
    WorkerState.STARTING: "starting",
    WorkerState.RETIRING: "leaving",
    WorkerState.KILLED: "being killed",
}


@dataclass(frozen=True, slots=True)
class Doing:
    """What one place in the pool does.

    Attributes:
        id: the place.
        pid: of its worker; None if it has none.
        what: in words.
        seconds: for how long; None where that is not known.
        busy: it runs a task.
    """

    id: int
    pid: int | None
    what: str
    seconds: float | None
    busy: bool

    def __str__(self) -> str:
        since = "" if self.seconds is None else f", for {self.seconds:.1f} s"
        return f"worker {self.id}, pid {self.pid}: {self.what}{since}"


def doings(handler: Handler, look: Look) -> list[Doing]:
    """What each place in the pool does."""
    by_slot = {int(worker.slot): worker for worker in handler.scheduler.workers}
    there = [slot for slot, record in enumerate(list(look.slots)) if not record.vacant]
    return [_doing(slot, by_slot.get(slot), handler, look) for slot in there]


def _doing(slot: int, worker: Worker | None, handler: Handler, look: Look) -> Doing:
    pid = look.slots[slot].pid
    if worker is None:
        return Doing(slot, pid, "there is no worker", None, False)
    job = look.direct_job(worker.id)
    direct = None if job is None else handler.direct.get(job)
    if direct is not None:
        return Doing(slot, pid, f"runs {direct[0]}", monotonic() - direct[1], True)
    state = _STATES.get(worker.state)
    if state is not None:
        return Doing(slot, pid, state, None, False)
    held = list(worker.held)
    if not held:
        return Doing(slot, pid, "idle", None, False)
    sink = handler.sinks.get(held[0].job)
    what = f"runs task {held[0].index} of {'a call' if sink is None else sink.story}"
    if worker.load > 1:
        what += f" ({worker.load - 1} more wait for it there)"
    return Doing(slot, pid, what, monotonic() - worker.progress_at, True)


def collect_stats(handler: Handler, look: Look) -> PoolStats:
    """All numbers of a pool.

    Args:
        handler: the pool's.
        look: at its workers.
    """
    slots = look.slots
    memory, peak = look.memory_nbytes(None)
    return PoolStats(
        look.tasks_done,
        handler.workers_lost,
        sum(slot.moved_nbytes for slot in slots),
        sum(slot.piped_nbytes for slot in slots),
        handler.tasks_retried,
        handler.tasks_timed_out,
        memory,
        peak,
        tuple(_worker_stats(number, look) for number in range(len(slots))),
    )


def _worker_stats(number: int, look: Look) -> WorkerStats:
    slot = look.slots[number]
    memory, peak = look.memory_nbytes(number)
    return WorkerStats(
        number,
        slot.pid,
        slot.tasks_done,
        slot.busy_seconds,
        max(0.0, slot.seconds_up() - slot.busy_seconds),
        slot.moved_nbytes,
        slot.piped_nbytes,
        memory,
        peak,
        max(0, slot.workers - 1),
        tuple(failures.tell(loss) for loss in list(slot.losses)),
        min(slot.seconds_transferring(), slot.busy_seconds),
    )


def text_report(head: str, handler: Handler, look: Look, *, stacks: bool) -> str:
    """The page of ``Pool.report``."""
    lines = [head]
    for doing in doings(handler, look):
        lines.append(str(doing))
        losses = list(look.slots[doing.id].losses)
        if losses:
            lines.append(f"    before it: {failures.tell(losses[-1])}")
        if stacks and doing.pid is not None and doing.what != "idle":
            stack = look.stack(doing.id)
            if stack is None:
                stack = f"it does not tell where it is: {_process_state(doing.pid)}"
            lines += [f"    {line}" for line in stack.splitlines()]
    return "\n".join(lines)


_PROCESS_STATES = {
    "R": "it runs, or waits for a CPU",
    "S": "it sleeps; it is only starting, perhaps, or a task has taken its signal handler away",
    "D": "it waits in the kernel, for a disk perhaps",
    "T": "its process is stopped (SIGSTOP)",
    "t": "a debugger has stopped it",
}


def _process_state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "its process is gone"
    return _PROCESS_STATES.get(state, f"its process is in state {state}")


def html_table(head: str, handler: Handler, look: Look, stats: PoolStats) -> str:
    """A pool as a notebook shows it: one row for each place."""
    names = (
        "worker",
        "pid",
        "now",
        "for s",
        "tasks",
        "busy s",
        "transfer s",
        "idle s",
        "by handle",
        "by copy",
        "memory",
        "restarts",
    )
    rows = []
    for doing in doings(handler, look):
        if doing.id >= len(stats.workers):
            break  # the pool has grown since they were counted
        worker = stats.workers[doing.id]
        seconds = "" if doing.seconds is None else f"{doing.seconds:.1f}"
        cells = (doing.id, doing.pid, doing.what, seconds, worker.tasks_done, f"{worker.busy_seconds:.1f}",
                 f"{worker.transfer_seconds:.1f}", f"{worker.idle_seconds:.1f}", size(worker.moved_nbytes),
                 size(worker.piped_nbytes), size(worker.memory_nbytes), worker.restarts)  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><caption>{html.escape(head)}</caption><tr>{header}</tr>{''.join(rows)}</table>"


def size(nbytes: int) -> str:
    """A number of bytes, for people."""
    amount, units = float(nbytes), ["B", "KB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        del units[0]
    return f"{amount:.3g} {units[0]}"
