"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, report
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.runner import Options, run

#: Beyond this no case of a quick run is begun, so that all of it ends within three minutes.
_QUICK_BUDGET_SECONDS = 140.0
_QUICK_ROUNDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        for case in CASES.values():
            print(f"{case.name:28} {case.description}")
        return 0
    if options.compare:
        print(report.comparison([json.loads((each / "results.json").read_text()) for each in options.compare]), end="")
        return 0
    out: Path = options.out
    if options.report:
        results = json.loads((out / "results.json").read_text())
    else:
        cases = chosen_cases(options.cases, options.quick)
        pools = options.pools.split(",") if options.pools else list(PEERS)
        if not cases or not set(pools) <= set(PEERS):
            print(f"no such case, or no such pool (there are: {', '.join(PEERS)})", file=sys.stderr)
            return 2
        results = run(
            Options(
                cases=cases,
                pools=pools,
                rounds=options.rounds or (_QUICK_ROUNDS if options.quick else None),
                quick=options.quick,
                out=out,
                budget=_QUICK_BUDGET_SECONDS if options.quick else float("inf"),
            )
        )
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(report.markdown(results))
    drawn = plots.draw(results, out)
    print(f"{out / 'results.md'}, {out / 'results.json'}" + (f", {len(drawn)} plots" if drawn else ""))
    return 0


def chosen_cases(patterns: str, quick: bool) -> list[Case]:
    """The cases whose names match one of the comma-separated patterns."""
    return [
        case
        for case in CASES.values()
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns.split(","))
        and (not quick or case.quick is not None)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="tpool beside other pools, in lockstep.")
    parser.add_argument("--cases", default="*", metavar="GLOBS", help="names of cases, e.g. 'tensor-*,apply'")
    parser.add_argument("--pools", default="", metavar="NAMES", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, help="counted rounds, for every case")
    parser.add_argument("--quick", action="store_true", help="small sizes, within three minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--report", action="store_true", help="render DIR/results.json anew, measure nothing")
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="DIR", help="print the targets of earlier runs side by side"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
