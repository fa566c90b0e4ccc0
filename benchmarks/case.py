"""What a case is: data that names it, sizes it and says what one round does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.meter import Meter
from benchmarks.peers.base import Handle, Peer

WORKERS = 2

Parameter = int | float | str


class Bench:
    """What a round works with.

    Attributes:
        peer: the library under test.
        params: the sizes of this run of the case.
        meter: takes the measurements.
    """

    def __init__(self, peer: Peer, pool: Handle | None, params: Mapping[str, Parameter], meter: Meter) -> None:
        self.peer = peer
        self.params = params
        self.meter = meter
        self._pool = pool

    @property
    def pool(self) -> Handle:
        """The pool that lives from round to round (cases with ``pool="shared"``)."""
        assert self._pool is not None, "the case opens pools of its own"
        return self._pool

    @contextlib.contextmanager
    def own_pool(self, workers: int = WORKERS, maxtasksperchild: int | None = None) -> Iterator[Handle]:
        """A pool for one round, closed after it."""
        pool = self.peer.open(workers, maxtasksperchild)
        yield pool  # after an error nobody closes it: the driver's whole tree is killed then
        pool.close()

    def integer(self, name: str) -> int:
        """A parameter that counts."""
        return int(self.params[name])

    def real(self, name: str) -> float:
        """A parameter that measures."""
        return float(self.params[name])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row (or a few, if it takes several times) of the results.

    Attributes:
        name: as on the command line.
        description: what is measured, for the reader of the table.
        run: does one round.
        params: sizes. ``items`` × ``nbytes`` × ``directions``, where given, is the memory moved in a round.
        quick: sizes that differ under ``--quick``; None leaves the case out there.
        rounds: how many rounds are counted.
        warm_up: whether one round goes before them.
        needs: features that a pool must have to take part.
        pool: ``shared``: one pool for all rounds; ``own``: each round opens its own; ``fresh``: and each round
            is in a fresh process.
        deadline: seconds that one round may take before the pool counts as hung.
        memory: whether a further round, which is not timed, samples the memory held.
        only: pools that take part, if not all.
        per: the parameter by which the report divides times; empty to leave them whole.
        group, x: a sweep and the place of this case in it, for plots.
    """

    name: str
    description: str
    run: Callable[[Bench], None]
    params: Mapping[str, Parameter] = field(default_factory=dict)
    quick: Mapping[str, Parameter] | None = None
    rounds: int = 7
    warm_up: bool = True
    needs: frozenset[str] = frozenset()
    pool: Literal["shared", "own", "fresh"] = "shared"
    deadline: float = 90.0
    memory: bool = False
    only: frozenset[str] | None = None
    per: str = "items"
    group: str = ""
    x: float = 0.0

    def sizes(self, quick: bool) -> dict[str, Parameter]:
        """The parameters of a run."""
        return {**self.params, **((self.quick or {}) if quick else {})}

    def moved_nbytes(self, params: Mapping[str, Parameter]) -> float:
        """Bytes that a round moves between processes; 0 where the case is not about bytes."""
        if "nbytes" not in params:
            return 0.0
        return float(params["items"]) * float(params["nbytes"]) * float(params.get("directions", 1))

    def divisor(self, params: Mapping[str, Parameter]) -> float:
        """What the report divides times by."""
        return float(params.get(self.per, 1))
