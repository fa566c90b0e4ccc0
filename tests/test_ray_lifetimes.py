"""From the first pool that needs Ray to the last: what is started, what it listens on, and that nothing is left."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_support import REASON
from support import run_script

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]

EXAMPLE = Path(__file__).parent.parent / "examples" / "one_machine_or_many.py"

DEADLINE = 120.0
# Ray's own daemons and workers take a moment to follow their raylet.
GRACE = 20.0


def test_importing_tpool_does_not_import_ray() -> None:
    run_script("import sys, tpool, tpool.ray; assert 'ray' not in sys.modules", DEADLINE).expect_success()


def test_without_ray_the_error_says_how_to_install_it() -> None:
    script = """
        import sys
        sys.modules["ray"] = None  # as if it were not installed
        import tpool
        try:
            tpool.Pool(2, engine="ray")
        except ImportError as error:
            assert "pip install 'tpool[ray]'" in str(error), error
        else:
            raise AssertionError
    """
    run_script(script, DEADLINE).expect_success()


def test_ray_is_started_on_loopback_and_stopped_with_the_last_pool() -> None:
    script = """
        import socket, threading, torch
        import tpool

        def listening():
            found = set()
            for name in ("tcp", "tcp6"):
                for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A":
                        found.add(fields[1].partition(":")[0])
            return found

        def in_a_thread_that_ends():
            global pool
            pool = tpool.Pool(1, engine=tpool.RayEngine(address="local"))

        before = listening()
        thread = threading.Thread(target=in_a_thread_that_ends)
        thread.start()
        thread.join()
        assert pool.apply(pow, (2, 3)) == 8
        new = listening() - before
        loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        assert new <= loopback, new

        import ray
        with tpool.Pool(1, engine="ray") as other:  # on the same Ray
            kept = other.apply_async(torch.ones, (1_000_000,))
            kept.wait(60)
        assert ray.is_initialized()
        late = pool.apply_async(torch.ones, (2_000_000,))
        late.wait(60)
        pool.close()
        pool.join()
        assert not ray.is_initialized()
        # The object store is gone, the results are not.
        assert late.get().sum() == 2_000_000
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tpool")]
    """
    run_script(script, DEADLINE, grace=GRACE).expect_success()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "raise KeyboardInterrupt", ""])
def test_a_driver_that_ends_anyhow_leaves_nothing(end: str) -> None:
    script = f"""
        import os, signal, time
        import tpool

        pool = tpool.Pool(2, engine=tpool.RayEngine(address="local"))
        result = pool.map_async(time.sleep, [600] * 4)
        {end}
    """
    # After a kill the agents of Ray's raylet try to tell a GCS that is gone, for up to a minute, before they go.
    ran = run_script(script, DEADLINE, grace=100.0)
    assert not ran.timed_out, ran
    assert not ran.survivors, ran.survivors


def run_example(where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that the example prints, run as the main script of this process."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), where])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.leaves(REASON)
def test_the_example_gives_the_same_on_one_machine_and_on_a_cluster(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = run_example("local", monkeypatch, capsys)
    assert "12 seeds tried" in local
    assert run_example(ray_cluster.address, monkeypatch, capsys) == local


@pytest.mark.slow
def test_the_example_on_a_cluster_of_its_own() -> None:
    pytest.importorskip("sklearn")
    # Ray's own setting that keeps a cluster to the loopback interface.
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(EXAMPLE.parent.parent)}
    command = [sys.executable, str(EXAMPLE), "ray"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "12 seeds tried" in ran.stdout
