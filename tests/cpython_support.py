"""CPython's own Pool tests, imported from the installed interpreter and bound to another pool.

``test._test_multiprocessing`` holds test cases without a pool of their own: the classes named ``_TestPool...`` take
``cls.Pool`` from a mixin, others call ``multiprocessing.Pool``. :func:`pool_cases` makes, for one start method, the
classes that pytest collects, with the given pool in both places::

    CPython's case ──┐
    its mixin      ──┼── PoolCase: start method, pool, twins of two exceptions, check for leaks
    unittest       ──┘

Nothing is copied. What is not run is in the table ``LEFT_OUT``, by name and with its reason, and each entry names
the test of ours that takes its place. :func:`pool_tests` finds all tests that use a pool by reading the source, so
that one which a later Python adds is noticed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import multiprocessing
import multiprocessing.pool
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import PoolProxy, SyncManager
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import pytest
from leaks import Snapshot, find_leaks

import tpool

__all__ = [
    "FORK_BESIDE_THREADS",
    "LEFT_OUT",
    "START_METHODS",
    "LeftOut",
    "load_cpython_tests",
    "pool_cases",
    "pool_tests",
]

START_METHODS = ("fork", "spawn", "forkserver")

# Of the pools that a manager hosts. What they add is the proxies, which know nothing of start methods, and twenty more
# interpreters that import torch would take longer than all the rest.
HOSTED_START_METHODS = ("fork", "forkserver")

# Put in the place of their namesakes in ``multiprocessing.pool``, to which the tests refer.
TWINS = {"RemoteTraceback": tpool.RemoteTraceback, "MaybeEncodingError": tpool.MaybeEncodingError}

# Python 3.12 warns of any fork beside threads; these tests fork on purpose, and a pool has threads.
FORK_BESIDE_THREADS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@dataclass(frozen=True)
class LeftOut:
    """A test of CPython's that is not run with our pool."""

    case: str
    test: str
    reason: str
    twin: str  # the test of ours in its place
    start_methods: tuple[str, ...] = START_METHODS
    kind: str = "processes"  # as opposed to the pool in a manager's process


LEFT_OUT = (
    LeftOut(
        "_TestPool",
        "test_make_pool",
        "counts the workers in the private list `_pool`",
        "test_make_pool",
    ),
    LeftOut(
        "_TestPool",
        "test_resource_warning",
        "sets the private `_state` of a pool that has ended back to RUN",
        "test_resource_warning",
    ),
    LeftOut(
        "_TestPoolWorkerLifetime",
        "test_pool_worker_lifetime",
        "reads process ids from the private list `_pool` and calls the private `_repopulate_pool`",
        "test_pool_worker_lifetime",
    ),
    LeftOut(
        "_TestPoolWorkerLifetime",
        "test_worker_finalization_via_atexit_handler_of_multiprocessing",
        "runs a script that imports the standard library's pool by name",
        "test_pool_left_to_the_exit_of_its_script",
    ),
    LeftOut(
        "TestPoolNotLeakOnFailure",
        "test_release_unused_processes",
        "replaces the class of worker processes through a private contract between pool and context",
        "test_pool_that_cannot_start_leaves_nothing",
    ),
    LeftOut(
        "TestStdinBadfiledescriptor",
        "test_pool_in_process",
        "its child process, a fresh interpreter, imports the standard library's pool by name",
        "test_pool_in_process",
        start_methods=("spawn", "forkserver"),
    ),
    LeftOut(
        "MiscTestCase",  # since Python 3.13
        "test_large_pool",
        "runs a script that uses the standard library's pool by name",
        "test_large_pool",
    ),
)


def load_cpython_tests() -> tuple[ModuleType | None, str]:
    """Import CPython's tests; without them (some distributions drop them) give None and the reason."""
    try:
        module = importlib.import_module("test._test_multiprocessing")
        inspect.getsource(module)
        return module, ""
    except (ImportError, OSError, unittest.SkipTest) as error:
        return None, f"this interpreter comes without CPython's multiprocessing tests: {error}"


def _hosted_pool(*args: Any, **kwargs: Any) -> tpool.Pool:
    """Make a pool in a manager's process, which was started by the method that the pool is to use."""
    return tpool.Pool(*args, **kwargs, context=multiprocessing.get_start_method())


class PoolManager(SyncManager):
    """A manager that hosts our pools; found by name in its server process."""


PoolManager.register("Pool", _hosted_pool, PoolProxy)


class PoolCase:
    """What surrounds each of CPython's cases: first in the order of resolution, so outermost."""

    start_method: ClassVar[str]
    make_pool: ClassVar[Callable[..., Any]]
    manager_class: ClassVar[type[SyncManager]] = PoolManager  # CPython's test of what managers host takes it from here
    pytestmark: ClassVar = [
        pytest.mark.leaves("the pool of a class outlives its tests: the class is checked instead"),
        FORK_BESIDE_THREADS,
    ]

    @classmethod
    def setUpClass(cls) -> None:
        """Set the start method and the names that the tests refer to, for as long as the class runs."""
        before = Snapshot.take()
        cls.addClassCleanup(cls.assert_nothing_left, before)  # registered first, runs last
        cls.addClassCleanup(
            multiprocessing.set_start_method, multiprocessing.get_start_method(allow_none=True), force=True
        )
        multiprocessing.set_start_method(cls.start_method, force=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(multiprocessing, "Pool", cls.make_pool))
            for name, twin in TWINS.items():
                stack.enter_context(mock.patch.object(multiprocessing.pool, name, twin))
            cls.addClassCleanup(stack.pop_all().close)
        super().setUpClass()  # CPython's: may make a pool for all of its tests

    @staticmethod
    def assert_nothing_left(before: Snapshot) -> None:
        """Fail the class, once its pool has been joined, for whatever it left."""
        if left := find_leaks(before):
            pytest.fail("CPython's tests left behind:\n  " + "\n  ".join(left), pytrace=False)


class HostedPool:
    """Stands before CPython's mixin for pools that live in a manager's process and are used through proxies."""

    manager: ClassVar[SyncManager]

    @classmethod
    def setUpClass(cls) -> None:
        """Put a manager that hosts our pools in the place of the one that hosts the standard library's."""
        super().setUpClass()
        cls.manager.shutdown()
        cls.manager = PoolManager()
        cls.manager.start()


def pool_cases(module: ModuleType, start_method: str, home: str) -> dict[str, type]:
    """Make the classes that run CPython's Pool tests with our pool under one start method.

    Args:
        module: CPython's tests.
        start_method: for the pool and for all else that the tests start.
        home: name of the module that will hold the classes: workers look them up there.

    Returns:
        The classes by name.
    """
    make_pool = staticmethod(partial(tpool.Pool, context=start_method))
    cases = {}
    for name, kind, tests in _cases(module, start_method):
        kept = tests - _left_out(name, kind, start_method)
        if kept:
            bases = _bases(module, name, kind)
            title = f"{name.lstrip('_')}{kind.capitalize()}{start_method.capitalize()}"
            own = {"__module__": home, "start_method": start_method, "make_pool": make_pool}
            if kind == "processes":
                own["Pool"] = make_pool
            # unittest collects what is callable: None takes a test away.
            cases[title] = type(title, bases, {**dict.fromkeys(_tests(bases) - kept), **own})
    return cases


def _cases(module: ModuleType, start_method: str) -> Iterator[tuple[str, str, set[str]]]:
    """(name of CPython's class, kind, tests) of all that uses pools of processes."""
    for name, tests in pool_tests(module).items():
        case = getattr(module, name)
        if not name.startswith("_TestPool"):
            yield name, "processes", tests
            continue
        yield name, "processes", _tests((case,))
        # The third kind, "threads", is for the thread pool, which we do not replace.
        if "manager" in case.ALLOWED_TYPES and start_method in HOSTED_START_METHODS:
            yield name, "manager", _tests((case,))


def _bases(module: ModuleType, name: str, kind: str) -> tuple[type, ...]:
    case = getattr(module, name)
    if issubclass(case, unittest.TestCase):
        return (PoolCase, case)
    mixin = getattr(module, f"{kind.capitalize()}Mixin")
    host = (HostedPool,) if kind == "manager" else ()
    return (PoolCase, case, *host, mixin, unittest.TestCase)


def _tests(bases: tuple[type, ...]) -> set[str]:
    return {name for base in bases for name in dir(base) if name.startswith("test") and callable(getattr(base, name))}


def _left_out(case: str, kind: str, start_method: str) -> set[str]:
    return {
        entry.test
        for entry in LEFT_OUT
        if entry.case == case and entry.kind == kind and start_method in entry.start_methods
    }


def pool_tests(module: ModuleType) -> dict[str, set[str]]:
    """Find CPython's tests that use a pool, by class, in the source of its module."""
    tree = ast.parse(inspect.getsource(module))
    helpers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _mentions(node, set())}
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                test = isinstance(member, ast.FunctionDef) and member.name.startswith("test")
                if test and (node.name.startswith("_TestPool") or _mentions(member, helpers)):
                    found.setdefault(node.name, set()).add(member.name)
    return found


def _mentions(node: ast.AST, helpers: set[str]) -> bool:
    """Whether this code makes a pool: ``Pool(``, also of a module, or in the text of a script; or calls a helper."""
    for part in ast.walk(node):
        name = getattr(part, "id", None) or getattr(part, "attr", None)
        if name == "Pool" or name in helpers:
            return True
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and "Pool(" in part.value:
            return True
    return False
