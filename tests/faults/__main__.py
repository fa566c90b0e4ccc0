"""The table of cases and pools: ``python -m tests.faults --pools tpool multiprocessing --markdown``."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

from . import harness
from .adapters import ADAPTERS
from .script import CASES, METHODS

SIGNS = {"pass": "✓", "n/a": "–"}


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that compute, beside the cases."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tell(one: harness.Outcome) -> None:
    """One line per outcome, on stderr."""
    detection = f" noticed after {one.detection * 1000:.1f} ms;" if one.detection is not None else ""
    notes = "; ".join(note for note in one.notes if "\n" not in note)
    line = f"{one.outcome:5}{one.pool:16}{one.method:11}{one.case:32}{one.seconds:7.2f} s{detection} {notes}"
    print(line.rstrip(), file=sys.stderr)
    if one.outcome not in ("pass", "n/a"):
        print("      " + one.reason, file=sys.stderr)
    sys.stderr.flush()


def markdown(outcomes: list[harness.Outcome], pools: list[str]) -> str:
    """A row per case, a column per pool. With several start methods or repeats a cell holds the worst."""
    worst: dict[tuple[str, str], str] = {}
    order = ("n/a", "pass", "leak", "fail", "hang")
    for one in outcomes:
        key = (one.case, one.pool)
        worst[key] = max(worst.get(key, "n/a"), one.outcome, key=order.index)
    lines = ["| | case | " + " | ".join(f"`{pool}`" for pool in pools) + " |", "|---|---|" + "---|" * len(pools)]
    for case in sorted(CASES.values(), key=lambda case: case.item):
        cells = [worst.get((case.name, pool), "") for pool in pools]
        if any(cells):
            shown = " | ".join(SIGNS.get(cell, cell) for cell in cells)
            lines.append(f"| {case.item} | {case.title} | {shown} |")
    totals = []
    for pool in pools:
        found = [outcome for (_, name), outcome in worst.items() if name == pool and outcome != "n/a"]
        totals.append(f"{found.count('pass')} of {len(found)}")
    lines.append("| | **handled** | " + " | ".join(totals) + " |")
    return "\n".join(lines)


def read(paths: list[str]) -> list[harness.Outcome]:
    """The outcomes in these files; of a case that was run again, under the same method, the later one."""
    latest: dict[tuple[str, str, str], harness.Outcome] = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for fields in json.load(file):
                one = harness.Outcome(**fields)
                latest[one.pool, one.method, one.case] = one
    return list(latest.values())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--pools", nargs="+", default=["tpool"], help=f"of {', '.join(ADAPTERS)}; or 'installed'")
    parser.add_argument("--methods", nargs="+", default=["forkserver"], help="start methods, or 'all'")
    parser.add_argument("--cases", nargs="+", default=["*"], help="shell patterns")
    parser.add_argument("--everything", action="store_true", help="also the cases that CI leaves out")
    parser.add_argument("--isolate", action="store_true", help="an interpreter for each case")
    parser.add_argument("--repeat", type=int, default=1, help="so many times in a row")
    parser.add_argument("--load", type=int, default=0, help="so many busy loops beside the cases")
    parser.add_argument("--jobs", type=int, default=2, help="so many interpreters at a time")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--json", help="write all outcomes to this file")
    parser.add_argument("--merge", nargs="+", help="run nothing; make the table of what earlier runs wrote")
    return parser.parse_args()


def main() -> int:
    """Runs what was asked for; the exit status says whether tpool (or the only pool) handled everything."""
    arguments = parse()
    pools = arguments.pools
    if pools == ["installed"]:
        pools = [name for name, adapter in ADAPTERS.items() if adapter.installed()]
    if arguments.merge:
        print(markdown(read(arguments.merge), pools))
        return 0
    methods = METHODS if arguments.methods == ["all"] else arguments.methods
    batches = []
    for pool in pools:
        chosen = harness.select(pool, methods, arguments.cases, everything=arguments.everything)
        batches += harness.plan(pool, chosen, arguments.isolate)
    begin = time.monotonic()
    outcomes = []
    with busy_loops(arguments.load):
        for _ in range(arguments.repeat):
            outcomes += harness.run(batches, arguments.jobs, tell)
    counts = {kind: sum(one.outcome == kind for one in outcomes) for kind in ("pass", "fail", "hang", "leak", "n/a")}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{summary} in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(one) for one in outcomes], file, indent=1)
    if arguments.markdown:
        print(markdown(outcomes, pools))
    return int(any(one.outcome not in ("pass", "n/a") for one in outcomes if one.pool == pools[0]))


if __name__ == "__main__":
    sys.exit(main())
