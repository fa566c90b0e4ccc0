"""This process's connection to Ray: made for the first pool that needs one, ended with the last.

Ray is connected once per process. A connection that the user made is used and left alone; one that a pool made ends
with the last pool that uses it, and with it a Ray that was started for it.

A local Ray is started from a thread that lives as long as it: its processes are told by the kernel to die with the
*thread* that started them, and a pool may be made in a thread that ends.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tpool.errors import PlatformError
from tpool.ray.spec import RayEngine
from tpool.waiting import Flag

__all__ = ["Cluster", "connect", "load_ray", "on_loopback"]

logger = logging.getLogger("tpool")


def load_ray() -> Any:
    """Ray itself.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray, which is not installed: pip install 'tpool[ray]'") from error


@dataclass(slots=True)
class _Connection:
    """What the pools of this process share.

    Attributes:
        users: how many pools use the connection that a pool made.
        end: told to end that connection; None if there is none.
        thread: which made it and will end it.
    """

    users: int = 0
    end: Flag | None = None
    thread: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


# Ray is global to a process, and so is this.
_connection = _Connection()


class Cluster:
    """What one pool has of Ray.

    Args:
        ray: the module.
        ours: this pool counts as a user of a connection that a pool made.
    """

    def __init__(self, ray: Any, ours: bool) -> None:
        self.ray = ray
        self._ours = ours

    def release(self) -> bool:
        """This pool needs it no more; returns whether the connection ended."""
        ours, self._ours = self._ours, False
        if not ours:
            return False
        with _connection.lock:
            _connection.users -= 1
            if _connection.users:
                return False
            end, thread = _connection.end, _connection.thread
            _connection.end = _connection.thread = None
            assert end is not None
            assert thread is not None
            end.set()
            thread.join()
        return True

    @property
    def ends_with_us(self) -> bool:
        """Whether the connection ends when this pool lets go of it."""
        return self._ours and _connection.users == 1

    def node_id(self) -> str:
        """The node that this process is on."""
        return str(self.ray.get_runtime_context().get_node_id())

    def total(self) -> dict[str, float]:
        """The resources of all nodes."""
        return dict(self.ray.cluster_resources())

    def available(self) -> dict[str, float]:
        """Those that nobody holds."""
        return dict(self.ray.available_resources())

    def store_nbytes(self) -> int:
        """The memory of all nodes' object stores."""
        return int(self.ray.cluster_resources().get("object_store_memory", 0))


def connect(spec: RayEngine) -> Cluster:
    """Use the connection there is, or make one.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no Ray at that address.
        ValueError: this process is connected to another Ray.
    """
    ray = load_ray()
    with _connection.lock:
        if ray.is_initialized():
            _check_address(ray, spec.address)
            if _connection.end is None:
                return Cluster(ray, False)
        else:
            _connection.end, _connection.thread = _start(ray, spec.address)
            _connection.users = 0
        _connection.users += 1
        return Cluster(ray, True)


def _check_address(ray: Any, address: str | None) -> None:
    if address in (None, "auto", "local"):
        return
    here = ray.get_runtime_context().gcs_address
    if address != here:
        raise ValueError(f"this process is connected to Ray at {here}; it cannot use {address} at the same time")


def _start(ray: Any, address: str | None) -> tuple[Flag, threading.Thread]:
    end, begun = Flag(), Flag()
    errors: list[BaseException] = []

    def live() -> None:
        try:
            with _without_noise():
                _init(ray, address)
        except BaseException as error:
            errors.append(error)
            return
        finally:
            begun.set()
        end.wait()
        ray.shutdown()

    thread = threading.Thread(target=live, name="tpool-ray", daemon=True)
    thread.start()
    begun.wait()
    if errors:
        thread.join()
        raise errors[0]
    logger.info("connected to Ray at %s", ray.get_runtime_context().gcs_address)
    return end, thread


def _init(ray: Any, address: str | None) -> None:
    services = importlib.import_module("ray._private.services")
    if services.canonicalize_bootstrap_address(address) is None:  # there is none, so one is started
        with on_loopback():
            ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)


@contextmanager
def on_loopback() -> Iterator[None]:
    """While it lasts, a Ray that is started binds to the loopback interface alone.

    Ray takes the address of a node from the route to the internet, and resolves even 127.0.0.1 to that; except where
    it believes that clusters are not supported (macOS, Windows), which this setting of Ray's says. A Ray that is only
    connected to has its addresses already.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    if not hasattr(constants, "ENABLE_RAY_CLUSTER"):
        raise PlatformError("this version of Ray cannot be kept to the loopback interface; start it by ray start")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_noise() -> Iterator[None]:
    """Ray warns that it does not take SIGTERM over, as it does from the main thread. It should not, so all is well."""

    def wanted(record: logging.LogRecord) -> bool:
        return "SIGTERM handler" not in record.getMessage()

    noisy = logging.getLogger("ray._private.worker")
    noisy.addFilter(wanted)
    try:
        yield
    finally:
        noisy.removeFilter(wanted)
