"""What the user may ask of a pool, checked: each function gives the value to use or raises an error with the cure."""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Callable, Iterable
from multiprocessing.context import BaseContext
from typing import Any, cast

import torch

from tpool.arguments import tell
from tpool.local.cpus import available_cpus
from tpool.local.seat import Steering
from tpool.tensors.budget import default_budget_nbytes
from tpool.tensors.storages import Sharing

START_METHODS = ("forkserver", "fork", "spawn")


def describe(func: object) -> str:
    """A function's name, for messages."""
    if isinstance(func, functools.partial):
        func = func.func
    return str(getattr(func, "__qualname__", None) or type(func).__qualname__)


def check_processes(processes: int | None) -> int:
    """How many workers; None for as many as CPUs may be used."""
    if processes is None:
        return available_cpus()
    if isinstance(processes, bool) or not hasattr(type(processes), "__index__"):
        cure = "; the initializer comes second, as in Pool(None, initializer)" if callable(processes) else ""
        raise TypeError(f"processes must be a number of workers, or None for one a CPU, not {tell(processes)}{cure}")
    if processes < 1:
        raise ValueError(f"Number of processes must be at least 1, not {processes}; leave it out for one a CPU")
    return operator.index(processes)


def check_new_size(processes: int) -> int:
    """How many workers a pool is to have from now on."""
    if isinstance(processes, bool) or not isinstance(processes, int):
        raise TypeError(f"processes must be a number of workers, not {processes!r}")
    if processes < 1:
        raise ValueError(f"a pool keeps at least 1 worker, not {processes}; close() it to have none")
    return processes


def check_initializer(initializer: Callable[..., object] | None) -> Callable[..., object] | None:
    """An initializer is called, so it must be callable."""
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be a callable, or None, not {tell(initializer)}; its arguments: initargs=")
    return initializer


def check_worker_exit(worker_exit: Callable[[], object] | None) -> Callable[[], object] | None:
    """What is called at a worker's end."""
    if worker_exit is not None and not callable(worker_exit):
        raise TypeError(f"worker_exit must be a callable without arguments, or None, not {worker_exit!r}")
    return worker_exit


def check_max_tasks(maxtasksperchild: int | None) -> int | None:
    """After how many calls a worker is replaced."""
    if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild < 1):
        raise ValueError("maxtasksperchild must be a positive int or None")
    return maxtasksperchild


def check_preload(preload: Iterable[str]) -> tuple[str, ...]:
    """Names of modules."""
    if isinstance(preload, str):
        raise TypeError(f"preload must be a list of module names, not the text {preload!r}; write [{preload!r}]")
    return tuple(preload)


def check_sharing(sharing: str) -> Sharing:
    """How storages are sent."""
    if sharing not in ("share", "copy"):
        raise ValueError(f"sharing must be 'share' or 'copy', not {sharing!r}")
    return cast("Sharing", sharing)


def start_method(context: str | BaseContext | None) -> str:
    """The start method's name, given or taken from a context of ``multiprocessing``."""
    if context is None:
        return "forkserver"
    method = context if isinstance(context, str) else getattr(context, "get_start_method", str)()
    if method not in START_METHODS:
        raise ValueError(
            f"context must be one of {', '.join(START_METHODS)}, or a context of multiprocessing; not {context!r}"
        )
    return method


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_nbytes(memory: int | str | None) -> int:
    """The pool's memory in bytes: a number, text such as ``"2GB"`` or ``"512MiB"``, or None for the default."""
    if memory is None:
        return default_budget_nbytes()
    nbytes = parse_size("memory", memory)
    if nbytes < 1 << 20:
        raise ValueError(f"memory must be at least 1 MiB, not {memory!r}")
    return nbytes


def parse_size(name: str, size: int | str) -> int:
    """A size in bytes, given as a number or as text."""
    if isinstance(size, str):
        text = size.strip().upper()
        number = text.rstrip("KMGTIB ")
        unit = _UNITS.get(text[len(number) :].strip())
        try:
            nbytes = int(float(number) * unit) if unit is not None else None
        except ValueError:
            nbytes = None
    else:
        nbytes = None if isinstance(size, bool) or not isinstance(size, (int, float)) else int(size)
    if nbytes is None:
        raise ValueError(f"{name} {size!r} is not a size; write a number of bytes, or text such as '2GB'")
    return nbytes


def check_chunksize(chunksize: int | None) -> int | None:
    """How many items travel together."""
    if chunksize is None:
        return None
    if isinstance(chunksize, bool) or not hasattr(type(chunksize), "__index__"):
        raise TypeError(
            f"chunksize must be a number of items, not {chunksize!r}; "
            "for several iterables: starmap(func, zip(xs, ys)) or executor().map(func, xs, ys)"
        )
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}; leave it out to have the pool choose")
    return chunksize


def check_buffersize(buffersize: int | None) -> int | None:
    """How many items a stream may hold."""
    if buffersize is None:
        return None
    if isinstance(buffersize, bool) or not hasattr(type(buffersize), "__index__"):
        raise TypeError(f"buffersize must be a number of items, or None, not {buffersize!r}; in bytes: buffer_nbytes=")
    if buffersize < 1:
        raise ValueError(f"buffersize must be 1 or more, not {buffersize}")
    return buffersize


def check_buffer_nbytes(buffer_nbytes: int | str | None) -> int | None:
    """How many bytes a stream may hold."""
    if buffer_nbytes is None:
        return None
    nbytes = parse_size("buffer_nbytes", buffer_nbytes)
    if nbytes < 1:
        raise ValueError(f"buffer_nbytes must be 1 or more, not {buffer_nbytes!r}")
    return nbytes


def check_seed(seed: int | None) -> int | None:
    """What random numbers begin with."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or None, not {seed!r}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    return seed


# What each worker is given -----------------------------------------------------------------------------------------


def check_steering(
    threads: int | None,
    affinity: object,
    devices: Iterable[str] | None,
    max_memory: int | str | None,
    max_cuda_memory: int | str | None,
    method: str,
) -> Steering:
    """Threads, CPUs, devices and memory of the workers; see ``Pool``."""
    return Steering(
        _check_threads(threads, method),
        _check_affinity(affinity),
        _check_devices(devices),
        _check_max("max_memory", max_memory),
        _check_max("max_cuda_memory", max_cuda_memory),
    )


def _check_threads(threads: int | None, method: str) -> int | None:
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be a number for each worker, or None, not {threads!r}")
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, not {threads}")
    if threads > 1 and method == "fork":
        raise ValueError(
            "threads must be 1 with context='fork': a forked worker hangs in OpenMP once this process has used it; use"
            " the default start method"
        )
    return threads


def _check_affinity(affinity: Any) -> tuple[frozenset[int], ...]:
    ours = sorted(os.sched_getaffinity(0))
    if affinity is None or affinity is False:
        return ()
    if affinity is True:
        return tuple(frozenset({cpu}) for cpu in ours)
    try:
        given = [{entry} if hasattr(type(entry), "__index__") else set(entry) for entry in affinity]
        sets = tuple(frozenset(map(operator.index, entry)) for entry in given)
    except TypeError as error:
        raise TypeError(
            f"affinity must be True (a CPU for each worker) or CPUs for one worker after the other, as in [0, 1] or"
            f" [{{0, 1}}, {{2, 3}}]; not {affinity!r}"
        ) from error
    if not sets or not all(sets):
        raise ValueError(f"affinity must name at least one CPU for each worker; not {affinity!r}")
    foreign = sorted(frozenset().union(*sets).difference(ours))
    if foreign:
        raise ValueError(f"affinity names CPUs {foreign}; this process may use {ours}")
    return sets


def _check_devices(devices: Iterable[str] | None) -> tuple[str, ...]:
    if devices is None:
        return ()
    if isinstance(devices, (str, torch.device)):
        raise TypeError(f"devices must be a list, not {devices!r}; write [{str(devices)!r}]")
    names = tuple(map(str, devices))
    if not names:
        raise ValueError("devices must name at least one device; leave it out to use the CPU")
    for name in names:
        _check_device(name)
    return names


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"devices: {name!r} is no device of torch; write 'cuda:0', 'cpu' or the like") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"devices: {name!r} cannot be used, as torch finds no CUDA GPU here; leave devices out")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"devices: there is no {name!r}; this machine has cuda:0 to cuda:{count - 1}")


def _check_max(name: str, size: int | str | None) -> int | None:
    if size is None:
        return None
    nbytes = parse_size(name, size)
    if nbytes < 1:
        raise ValueError(f"{name} must be 1 or more bytes, not {size!r}")
    return nbytes


MOST_TIMELINE_TASKS = 1 << 24  # a gigabyte for each worker
TIMELINE_TASKS = 1 << 16
"""How many tasks of each worker a timeline keeps. More: more shared memory, 64 bytes each. Fewer: less of the past."""


def check_timeline(timeline: bool | int) -> int:
    """How many tasks of each worker are kept; 0 for no timeline."""
    if isinstance(timeline, bool):
        return TIMELINE_TASKS if timeline else 0
    if not isinstance(timeline, int):
        raise TypeError(f"timeline must be True, False or a number of tasks to keep for each worker, not {timeline!r}")
    if not 1 <= timeline <= MOST_TIMELINE_TASKS:
        raise ValueError(f"timeline must be True, False or a number from 1 to {MOST_TIMELINE_TASKS}, not {timeline}")
    return timeline


def check_log_level(forward_logs: bool | int | str) -> int | None:
    """The level of the least records that workers send; None to send none."""
    if forward_logs is False:
        return None
    if forward_logs is True:
        return logging.getLogger().getEffectiveLevel()
    level = logging.getLevelName(forward_logs) if isinstance(forward_logs, str) else forward_logs
    if not isinstance(level, int):
        raise ValueError(f"forward_logs must be True, or a level such as 'INFO' or logging.INFO, not {forward_logs!r}")
    return level
