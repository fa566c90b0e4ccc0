"""Functions that the pool tests run in workers; importable there, unlike those of a test run as a script."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy
import torch

import tpool
from tpool.tensors import ageing, leases, placed

state = None


def identity(x):
    return x


def double(x):
    return x * 2


def add(x, y):
    return x + y


def add_one_in_place(tensor):
    with torch.no_grad():
        tensor.add_(1)


def fill(tensor, value):
    tensor.fill_(value)
    return tensor


def make_tensor(value, nbytes=4096):
    return torch.full((nbytes // 4,), value, dtype=torch.float32)


def kill_self(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_self_if(item):
    value, victim = item
    if victim:
        kill_self()
    return value


def raise_if_odd(x):
    if x % 2:
        raise ValueError(f"odd: {x}")
    return x


def raise_exception(error):
    raise error


def age_soon(seconds):
    """As an initializer: what the worker has not used for so long, it gives back."""
    ageing.AGE_SECONDS = seconds


def hold_until(tensor, path):
    """Leave a thread that holds the tensor until there is such a file."""

    def hold(held):
        while not os.path.exists(path):
            time.sleep(0.01)
        del held

    threading.Thread(target=hold, args=(tensor,), daemon=True).start()


def tell_if_the_last_moved(kind_and_numel):
    """A tensor of ones if the one that the last call returned lies in shared memory, else of zeros."""
    kind, numel = kind_and_numel
    last = last_returned.get("tensor")
    moved = last is not None and leases.table().locate(last.data_ptr(), last.untyped_storage().nbytes()) is not None
    made = torch.full((numel,), float(moved))
    last_returned["tensor"] = made
    if kind == "with grad":
        return made.requires_grad_()
    return (made,) if kind == "in a tuple" else made


last_returned = {}


def fill_the_same(number):
    """The same tensor each time, as of a function that keeps a buffer."""
    if "buffer" not in last_returned:
        last_returned["buffer"] = torch.empty(100_000)
    return last_returned["buffer"].fill_(number)


def make_counting_placed(number):
    """A large tensor; the worker counts those that it copies into shared memory."""
    count_placed(None)
    return torch.full((100_000,), float(number))


def count_placed(count):
    """How many tensors were copied since; sets the count, if one is given."""
    if "placed" not in last_returned:
        last_returned["placed"] = 0

        def noted(self, *arguments):
            last_returned["placed"] += 1
            made(self, *arguments)

        made, placed.Placed.__init__ = placed.Placed.__init__, noted
    known = last_returned["placed"]
    if count is not None:
        last_returned["placed"] = count
    return known


def make_and_keep(number):
    """A large tensor that this worker keeps."""
    last_returned.setdefault("kept", []).append(torch.full((100_000,), float(number)))
    return last_returned["kept"][-1]


def fill_what_is_kept(number):
    """How many were kept; all are filled, and forgotten if it is with 0."""
    kept = last_returned.setdefault("kept", [])
    for tensor in kept:
        tensor.fill_(number)
    count = len(kept)
    if number == 0:
        kept.clear()
    return count


def make_once_for_a_while(_number):
    """The same tensor for as long as somebody holds it."""
    tensor = known_weakly.get("tensor")
    if tensor is None:
        tensor = known_weakly["tensor"] = torch.zeros(100_000)
    return tensor


known_weakly = weakref.WeakValueDictionary()


def make_parts(_number):
    """Each time another tensor on the same memory, and each with all of it."""
    return last_returned.setdefault("whole", torch.zeros(100_000)).detach()


def make_sparse_or_fail(number):
    if number == 3:
        raise KeyError(number)
    return torch.eye(300).to_sparse() if number == 2 else torch.full((100_000,), float(number))


def leave_in_cycle(numel):
    """A tensor that is also in garbage which nobody collects."""
    gc.disable()
    tensor = torch.ones(numel)
    cycle = [tensor]
    cycle.append(cycle)
    return tensor


def do_what_it_says(what):
    """Of several kinds of task in one stream: 40 MB that also lie in garbage, 40 MB, a long nap, or nothing."""
    if what == "nap":
        time.sleep(2)
    return {"garbage": leave_in_cycle, "tensor": torch.ones}.get(what, lambda _: what)(10_000_000)


def get_pid(_=None):
    return os.getpid()


def wait_at(barrier_dir, count, seconds, number):
    """Meet ``count`` tasks in a directory: all must run at once."""
    Path(barrier_dir, str(number)).touch()
    deadline = time.monotonic() + seconds
    while len(os.listdir(barrier_dir)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {os.listdir(barrier_dir)} arrived")
        time.sleep(0.005)
    return number


def wait_for_file(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.005)
    return os.getpid()


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def set_state(value):
    global state
    state = value


def write_pid_to_directory(path):
    (Path(path) / str(os.getpid())).touch()


def get_state(_=None):
    return state


def surroundings(_=None):
    return {
        "cwd": os.getcwd(),
        "variable": os.environ.get("TPOOL_TEST_VARIABLE"),
        "path": list(sys.path),
        "argv": list(sys.argv),
        "name": multiprocessing.current_process().name,
        "parent": multiprocessing.parent_process().pid,
        "daemon": multiprocessing.current_process().daemon,
        "threads": torch.get_num_threads(),
        "info": tpool.get_worker_info(),
        "random": torch.rand(()).item(),
        "stdin": sys.stdin.read(),
    }


def use_nested_pool(numbers):
    with tpool.Pool(2) as pool:
        return pool.map(double, numbers)


def nested_tensor(value):
    with tpool.Pool(1) as pool:
        return pool.apply(make_tensor, (value,))


def resend_in_nested_pool(tensor):
    with tpool.Pool(1) as pool:
        pool.apply(add_one_in_place, (tensor,))
    return tensor


class NotesItsEnd:
    """Part of a reference cycle, so that only the collector ends it."""

    def __init__(self, path):
        self.path = path
        self.cycle = self

    def __del__(self):
        Path(self.path).touch()


kept = []


def keep_cycle(path):
    gc.disable()
    kept.append(NotesItsEnd(path))
    return os.getpid()


def drop_kept(_=None):
    kept.clear()


def raise_if_not(condition):
    if not condition:
        raise RuntimeError("the initializer failed as asked")


def use_mp_objects(lock, event, queue, value, barrier_parties):
    global state
    state = (lock, event, queue, value, barrier_parties)


def talk(number):
    lock, event, queue, value, _ = state
    with lock:
        value.value += 1
    queue.put(number)
    return event.wait(30)


def thread_names(_=None):
    return [thread.name for thread in threading.enumerate()]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("this object stays where it is")


def return_unpicklable(_=None):
    return Unpicklable()


class CannotUnpickle(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def raise_cannot_unpickle(_=None):
    raise CannotUnpickle("a story worth reading", 2)


def explode_on_load():
    raise RuntimeError("not in this process")


class ExplodesOnLoad:
    def __reduce__(self):
        return explode_on_load, ()


def return_exploding(_=None):
    return ExplodesOnLoad()


def open_if_path(item):
    """Block at a named pipe until somebody writes to it; return anything else at once."""
    if isinstance(item, str):
        open(item).close()
    return item


def make_tensor_after(item):
    """A tensor of so many bytes, once somebody has opened the named pipe for writing."""
    path, nbytes = item
    if path is not None:
        open(path).close()
    return torch.ones(nbytes, dtype=torch.uint8)


class TellsItsThread:
    """Notes in which thread it was unpickled."""

    def __init__(self):
        self.loaded_in = None

    def __getstate__(self):
        return {"some": "state"}

    def __setstate__(self, state):
        self.loaded_in = threading.current_thread().name


def count_attempt(path):
    """How often this was called with this path, this time included."""
    with open(path, "a") as stream:
        stream.write("x")
    return len(Path(path).read_text())


def fail_until(path, attempt, error):
    """Raise until it was tried so often."""
    count = count_attempt(path)
    if count < attempt:
        raise error
    return count


def die_until(path, attempt):
    count = count_attempt(path)
    if count < attempt:
        kill_self()
    return count


def hang_until(path, attempt):
    count = count_attempt(path)
    if count < attempt:
        time.sleep(60)
    return count


def hang_if(item):
    value, victim = item
    if victim:
        time.sleep(60)
    return value


def tell_pid_and_hang(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def identity_slowly(value, seconds):
    time.sleep(seconds)
    return value


def wait_if_path(item):
    """Wait until there is such a file, if it is a path."""
    if isinstance(item, Path):
        wait_for_file(item)
    return item


def discard(_):
    return None


def make_zeros(nbytes):
    return torch.zeros(nbytes, dtype=torch.uint8)


def draw(*_):
    """A number of each source of random numbers."""
    return random.random(), torch.rand(()).item(), float(numpy.random.rand())


def draw_until(path, attempt):
    """As draw, but the first attempts kill their workers after they have drawn."""
    numbers = draw()
    if count_attempt(path) < attempt:
        kill_self()
    return numbers


def open_log(path):
    """An initializer that keeps something for this worker."""
    tpool.get_worker_info().state.log = Path(path, f"{os.getpid()}")


def note(value):
    log = tpool.get_worker_info().state.log
    with log.open("a") as stream:
        stream.write(f"{value} ")
    return os.getpid()


def close_log():
    note("closed")


def fail_to_close():
    raise RuntimeError("it would not close")


# Objects that workers keep ------------------------------------------------------------------------------------------


def run_model(model, row):
    with torch.no_grad():
        return model(row)


def run_nested(item):
    ((model, row),) = item["deep"]
    return run_model(model, row)


def meet_with(obj, *meeting):
    wait_at(*meeting)
    return os.getpid()


def identify(obj):
    return os.getpid(), id(obj)


def add_to_weight(model, value):
    with torch.no_grad():
        model.weight.add_(value)


def read_weight(model):
    return model.weight.flatten()[0].item()


def first(tensor):
    return tensor[0].item()


def sum_inner(table):
    return int(table["inner"].sum())


class Watched:
    """Counted while it lives."""


def count_watched(watched=None):
    return sum(type(obj) is Watched for obj in gc.get_objects())


class Unreadable:
    def __reduce__(self):
        return _refuse_to_be_read, ()


def _refuse_to_be_read():
    raise ValueError("it will not be read")


# Batches ------------------------------------------------------------------------------------------------------------


def best_of_rows(batch):
    return batch.argmax(1)


def sum_and_count(batch):
    return {"sum": batch["x"].sum(1) + batch["y"], "count": torch.ones_like(batch["y"])}


def sum_of_columns(batch):
    return batch.sum(0, keepdim=True)


def nothing_after_the_first(batch):
    return batch if batch.flatten()[0] == 0 else None


def sleep_for_long(batch):
    time.sleep(60)


# Seen in reports ----------------------------------------------------------------------------------------------------


def tell_pid_and_spin_in_c(path):
    Path(path).write_text(str(os.getpid()))
    sum(range(1 << 60))


def lock_twice_in_c(path):
    """Wait for ever in a call that goes on waiting after a signal, without the interpreter's lock."""
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    Path(path).write_text(str(os.getpid()))
    libc.pthread_mutex_lock(mutex)


def same(number):
    return number


def call_functions(gate):
    while not os.path.exists(gate):
        for _ in range(1000):
            sum(map(same, range(10)))


def call_functions_in_threads(gate):
    while not os.path.exists(gate):
        threads = [start_thread(functools.partial(sum, map(same, range(1000)))) for _ in range(3)]
        for thread in threads:
            thread.join()


def work_in_c_and_python(gate):
    while not os.path.exists(gate):
        sum(range(10_000_000))  # some tenths of a second
        for _ in range(1000):
            sum(map(same, range(10)))


def wait_beside_a_thread(gate):
    thread = start_thread(functools.partial(wait_for_file, gate))
    thread.join()


def tell_pid_and_wait(path, gate):
    Path(path).write_text(str(os.getpid()))
    wait_for_file(gate)


def start_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# What workers are given ---------------------------------------------------------------------------------------------


def cpus_of_worker(_):
    return tpool.get_worker_info().id, os.sched_getaffinity(0)


def device_of_worker(_):
    return tpool.get_worker_info().id, (tpool.get_worker_info().device, torch.empty(1).device.type)


kept = []


class _Mallinfo2(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = [
        ("unused", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("unused_too", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("the_rest", ctypes.c_size_t * 2),
    ]


def memory_in_use():
    """What this process holds: bytes of C's heap, objects in Python's, mappings. None counts what is free again."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    heap = mallinfo2()
    with open("/proc/self/maps") as mappings:
        return {
            "malloc": heap.uordblks + heap.hblkhd,
            "objects": sys.getallocatedblocks(),
            "mappings": sum(1 for _ in mappings),
        }


def keep(nbytes):
    kept.append(b"x" * nbytes)
    return os.getpid()


def fill_and_tell_pid(tensor, value):
    tensor.fill_(value)
    return os.getpid()


# Logging ------------------------------------------------------------------------------------------------------------


def log(item):
    logging.getLogger("experiment").info("item %d of %d", item, 10)
    return os.getpid()


def log_and_wait(gate):
    logging.getLogger("experiment").debug("before")
    wait_for_file(gate)


def log_exception(text):
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger("experiment").exception(text)


def meet(folder, count):
    """Wait until so many workers are in here at once; gives the worker's pid."""
    (Path(folder) / str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < count:
        time.sleep(0.005)
    return os.getpid()


class SlowToTravel:
    """Takes so many seconds to be pickled in a worker, and to be unpickled anywhere."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __reduce__(self):
        if tpool.get_worker_info() is not None:
            time.sleep(self.seconds)
        return make_slow_to_travel, (self.seconds,)


def make_slow_to_travel(seconds):
    if tpool.get_worker_info() is not None:
        time.sleep(seconds)
    return SlowToTravel(seconds)


def stand_in_for_cuda(step):
    """In a worker: torch's allocator seems to reserve so many bytes more with each task."""
    reserved = {0: 0, 1: 0}
    state = tpool.get_worker_info().state
    state.reserved, state.step = reserved, step
    torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: len(reserved)
    torch.cuda.memory_reserved = reserved.__getitem__


def reserve_more(device):
    """Gives the pid."""
    state = tpool.get_worker_info().state
    state.reserved[device] += state.step
    return os.getpid()


def info_and_threads(_=None):
    info = tpool.get_worker_info()
    return info.id, info.num_workers, torch.get_num_threads(), info.device


def fail_if_exists(path):
    if os.path.exists(path):
        raise ValueError("bad")


def wait_and_kill_self(path):
    wait_for_file(path)
    kill_self()


def has_trace():
    """Whether this worker writes down what it does."""
    return "tpool-trace" in Path("/proc/self/maps").read_text()


def uses_cuda(_=None):
    return torch.cuda.is_initialized()


def reserve_on_gpu(nbytes):
    """The task's tensor dies with it; the allocator keeps its memory."""
    torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return os.getpid()


def make_on(device):
    return torch.ones(3, device=device)


def keep_values(values):
    kept[:] = values


def kept_value(number):
    return None if number is None else kept[number % len(kept)]


def nan_of(_):
    return float("nan")


def die_if_in(item):
    number, fatal = item
    if fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def meet_if_told(paths):
    """Show oneself at the one path and wait for somebody at the other."""
    if paths is not None:
        mine, theirs = paths
        Path(mine).touch()
        wait_for_file(theirs)
    return paths


def fork_if_told(item):
    number, told = item
    if told:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
    return number


def append_and_tell(numbers):
    numbers.append(0)
    return numbers


class UnpicklesBadly:
    def __call__(self, item):
        return item

    def __reduce__(self):
        return (raise_if_odd, (1,))


class Made:
    pass


def make_or_look_for_the_last(number):
    """An object, for an even number; whether it is gone, for the next one."""
    if number % 2:
        return kept.pop()() is None
    made = Made()
    kept.append(weakref.ref(made))
    return made


def fork_in_c_if_told(item):
    number, told = item
    if told:
        child = ctypes.PyDLL(None).fork()
        if child:
            os.waitpid(child, 0)
    return number


SOON_SECONDS = 50e-6


def raise_soon(_):
    end = time.perf_counter() + SOON_SECONDS
    while time.perf_counter() < end:
        pass
    raise ValueError("soon")
