"""No test leaves anything behind: checked after every test, and after every module for its wider fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from leaks import Snapshot, find_leaks

_LEAVES = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the way out, which has to say why."""
    config.addinivalue_line(
        "markers", "leaves(reason): this test may leave threads, processes, descriptors or shared memory behind"
    )


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Catch what fixtures of a class or module leave: they end after the last test's own check."""
    before = Snapshot.take()
    yield
    if not request.node.stash.get(_LEAVES, False):
        _fail_if_left(before, "module")


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves a thread, process, descriptor or /dev/shm entry behind."""
    marker = request.node.get_closest_marker("leaves")
    if marker is not None:
        _check_reason(marker)
        request.node.getparent(pytest.Module).stash[_LEAVES] = True
        yield
        return
    if request.node.get_closest_marker("cuda") is not None:
        _open_gpu()
    before = Snapshot.take()
    yield
    _fail_if_left(before, "test")


def _fail_if_left(before: Snapshot, who: str) -> None:
    if left := find_leaks(before):
        pytest.fail(f"this {who} left behind:\n  " + "\n  ".join(left), pytrace=False)


def _check_reason(marker: pytest.Mark) -> None:
    reason = marker.args[0] if len(marker.args) == 1 and not marker.kwargs else None
    if not isinstance(reason, str) or not reason.strip():
        pytest.fail("@pytest.mark.leaves needs one argument: the reason, in words", pytrace=False)


@pytest.fixture(scope="module")
def peering() -> Iterator[Any]:
    """Another process, which answers with what it was sent; of the module alone."""
    import kinds
    from codec_peer import Peering

    peering = Peering()
    yield peering
    peering.close()
    kinds.forget_scratch()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray of this test run alone, with room for four workers; started once, as that takes seconds."""
    from ray_support import started_ray

    with started_ray() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def local_ray(ray_cluster: Any) -> Any:
    """The module ``ray``, connected."""
    import ray

    return ray


def _open_gpu() -> None:
    """Have the driver open what it keeps open for the process's life before the first look."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()
        torch.zeros(1, device="cuda").item()
