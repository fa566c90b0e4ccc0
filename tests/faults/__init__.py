"""Fault cases: what goes wrong around a pool, played with real processes and real signals.

How a case runs::

    pytest / python -m tests.faults          one fresh interpreter for a batch of cases      its pool
    harness.run_batch ── Popen, own session ─► python -m faults.cases_x ── Pool(...) ─► workers
            │                                        │ one JSON line per case
            └──◄ report, stderr, exit status ────────┘
            └── then counts what is left: processes, /dev/shm, temporary files

- ``cases_*.py`` hold the cases, grouped by what fails. Their functions are definitions of ``__main__``.
- ``script.py`` is what a case may use: pools, marks that tasks leave behind, roles (a program that is the victim).
- ``adapters.py`` gives each peer the face of ``multiprocessing.Pool``, so that the same case runs on all of them.
- ``harness.py`` runs, watches and judges. Outcomes: ``pass``, ``fail``, ``hang``, ``leak`` and ``n/a`` (the peer has
  no such thing, or this machine cannot play it).
"""
