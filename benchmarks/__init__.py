"""tpool beside every other process pool, measured in lockstep: ``python -m benchmarks``.

How a run goes::

    __main__ ─► runner ──── one line of JSON each way ────► driver (one process per pool) ─► peers.* ─► workers
                  │            "run one round of case X"       └─ cases.*: what a round does, timed by Meter
                  ├─ limits: what this machine can do at best
                  └─ report (JSON, Markdown) and plots

Each pool has a driver process of its own, because peers change global state (sharing strategy, reducers, start
method) and would disturb one another. All drivers of a case are alive with their pools open; the runner asks them for
one round each, in turn: A B C A B C. So a slow moment of the machine meets all pools alike, and ratios are taken pair
by pair within one turn. Only one driver works at a time, and a pool has two workers.
"""
