"""Programs as users write them: functions and classes of ``__main__``, no guard, under every start method."""

from __future__ import annotations

import textwrap

import pytest
from methods import METHODS, seldom_spawned
from support import run_script

SECONDS = 60


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def run(source: str, method: str, args: tuple[str, ...] = ()) -> str:
    """What a script printed; ``METHOD`` stands for the start method."""
    source = textwrap.dedent(source).replace("METHOD", repr(method))
    # ResourceWarning: a pool, socket or file left open must not pass unseen.
    result = run_script(source, SECONDS, args=args, options=("-W", "error::ResourceWarning"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not result.survivors
    return result.stdout


def test_no_guard_is_needed(method):
    out = run(
        """
        import tpool, torch

        scale = 3

        def times(x):
            return x * scale

        class Point:
            def __init__(self, x): self.x = x
            def moved(self): return Point(times(self.x))

        with tpool.Pool(2, context=METHOD) as pool:
            print(pool.map(times, range(4)))
            print(pool.map(lambda x: x + scale, range(4)))
            points = pool.map(Point.moved, [Point(1), Point(2)])
            print([type(p) is Point and p.x for p in points])
        """,
        method,
    )
    assert out == "[0, 3, 6, 9]\n[3, 4, 5, 6]\n[3, 6]\n"


def test_a_global_that_the_initializer_sets(method):
    out = run(
        """
        import tpool

        model = None

        def prepare(name):
            global model
            model = name

        def use(x):
            return f"{model}-{x}"

        def count(x, calls=[]):
            global total
            total = globals().get("total", 0) + 1
            return total

        with tpool.Pool(1, prepare, ("net",), context=METHOD) as pool:
            print(pool.map(use, range(2)))
            print(pool.apply(use, (5,)))
            print(pool.map(count, range(3), chunksize=1))
            print(model)
            if METHOD != "fork":
                model = "rebound by the caller"
                print(pool.apply(use, (6,)))
        """,
        method,
    )
    expected = "['net-0', 'net-1']\nnet-5\n[1, 2, 3]\nNone\n"
    assert out == expected + ("" if method == "fork" else "rebound by the caller-6\n")


@seldom_spawned
def test_a_redefined_function_is_the_one_that_runs(method):
    out = run(
        """
        import tpool

        def step(x): return x + 1
        def walk(x): return step(step(x))

        with tpool.Pool(2, context=METHOD) as pool:
            print(pool.map(walk, [0]))
            def step(x): return x + 10
            print(pool.map(walk, [0]) if METHOD != "fork" else [20])
            def walk(x): return -step(x)
            print(pool.map(walk, [0]))
        """,
        method,
    )
    assert out == "[2]\n[20]\n[-10]\n"


def test_a_class_keeps_what_the_caller_did_to_it_while_a_task_ran(method, tmp_path):
    out = run(
        """
        import sys, os, time, tpool

        class Account:
            rate = 1
            def __init__(self, x): self.x = x

        def work(account, gate):
            while not os.path.exists(gate): time.sleep(0.005)
            account.x *= Account.rate
            return account

        with tpool.Pool(1, context=METHOD) as pool:
            result = pool.apply_async(work, (Account(7), sys.argv[1]))
            Account.rate = 5
            open(sys.argv[1], "w").close()
            account = result.get(30)
            print(type(account) is Account, account.x, Account.rate)
        """,
        method,
        args=(str(tmp_path / "gate"),),
    )
    assert out.split()[0::2] == ["True", "5"]


def test_a_closure_over_a_model_travels_once_per_worker_and_job(method):
    out = run(
        """
        import functools, tpool, torch

        loads = []

        class Model(torch.nn.Linear):
            def __setstate__(self, state):
                super().__setstate__(state)
                loads.append(1)

        def run(model, x):
            return model(x).sum().item(), len(loads)

        model = Model(4, 4)
        expected = model(torch.ones(4)).sum().item()
        with tpool.Pool(1, context=METHOD) as pool:
            results = pool.map(functools.partial(run, model), [torch.ones(4)] * 20, chunksize=1)
            print(all(abs(value - expected) < 1e-6 for value, _ in results), {count for _, count in results})

            def closure(x):
                return model(x).sum().item()
            print(all(abs(value - expected) < 1e-6 for value in pool.map(closure, [torch.ones(4)] * 5)))
        """,
        method,
    )
    first, second = out.splitlines()
    assert first == "True {1}"
    assert second == "True"


@seldom_spawned
def test_recursion_decorators_dataclasses_enums(method):
    out = run(
        """
        import dataclasses, enum, functools, tpool

        def traced(f):
            @functools.wraps(f)
            def wrapper(*args):
                wrapper.calls += 1
                return f(*args)
            wrapper.calls = 0
            return wrapper

        @traced
        def factorial(n):
            return 1 if n < 2 else n * factorial(n - 1)

        class Colour(enum.Enum):
            RED = 1
            BLUE = 2

        @dataclasses.dataclass
        class Pixel:
            x: int
            colour: Colour = Colour.RED

            def flip(self):
                return Pixel(-self.x, Colour.BLUE if self.colour is Colour.RED else Colour.RED)

        class Base:
            def name(self): return "base"

        class Derived(Base):
            def name(self): return super().name() + "-derived"

        with tpool.Pool(2, context=METHOD) as pool:
            print(pool.map(factorial, range(5)))
            flipped = pool.map(Pixel.flip, [Pixel(1), Pixel(2, Colour.BLUE)])
            print(flipped, flipped[0].colour is Colour.BLUE, isinstance(flipped[0], Pixel))
            print(pool.map(Base.name, [Derived()]) , pool.apply(Derived().name))
        """,
        method,
    )
    assert out.splitlines()[0] == "[1, 1, 2, 6, 24]"
    assert out.splitlines()[1].endswith("True True")
    assert out.splitlines()[2] == "['base'] base-derived"


@seldom_spawned
def test_a_program_that_ends_with_a_live_pool_ends(method):
    out = run(
        """
        import time, tpool, warnings
        warnings.simplefilter("ignore", ResourceWarning)
        pool = tpool.Pool(2, context=METHOD)
        print(pool.apply(len, ([1],)))
        busy = pool.map_async(time.sleep, [60, 60], chunksize=1)
        """,
        method,
    )
    assert out == "1\n"


@seldom_spawned
def test_a_kernel_like_namespace(method):
    """Cells executed one by one in ``__main__``, as a notebook does."""
    cells = [
        "import tpool\npool = tpool.Pool(2, context=METHOD)",
        "def f(x):\n    return x + 1",
        "print(pool.map(f, range(3)))",
        "offset = 100\ndef f(x):\n    return x + offset\nclass Box:\n    def __init__(self, x): self.x = x",
        "print(pool.map(f, range(3)))",
        "boxes = pool.map(Box, range(3)); print([type(b) is Box for b in boxes])",
        "class Box:\n    def __init__(self, x): self.x = -x",
        "print([b.x for b in pool.map(Box, range(3))])",
        "pool.terminate()",
    ]
    cells[0] = cells[0].replace("METHOD", repr(method))
    source = f"cells = {cells!r}\nmain = globals()\nfor cell in cells:\n    exec(cell, main)\n"
    out = run(source, method)
    assert out == "[1, 2, 3]\n[100, 101, 102]\n[True, True, True]\n[0, -1, -2]\n"


@seldom_spawned
def test_a_script_run_as_a_module(method, tmp_path):
    package = tmp_path / "somewhere"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "program.py").write_text(
        "import tpool\n"
        "def f(x): return x + 1\n"
        f"with tpool.Pool(2, context={method!r}) as pool:\n"
        "    print(pool.map(f, range(3)))\n"
    )
    out = run(
        "import subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'somewhere.program'], cwd=sys.argv[1], capture_output=True)\n"
        "print(done.stdout.decode() + done.stderr.decode(), end='')",
        method,
        args=(str(tmp_path),),
    )
    assert out == "[1, 2, 3]\n"


@seldom_spawned
def test_an_exception_prints_the_workers_traceback(method):
    source = f"""
        import tpool

        def boom(x):
            raise ValueError("here it is")

        with tpool.Pool(1, context={method!r}) as pool:
            pool.map(boom, [1])
    """
    result = run_script(textwrap.dedent(source), SECONDS)
    assert result.returncode == 1
    assert 'raise ValueError("here it is")' in result.stderr
    assert result.stderr.rstrip().endswith("ValueError: here it is")
    assert "RemoteTraceback" in result.stderr
