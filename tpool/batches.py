"""``map_batches``: a function over the batches of a big tensor; a part of ``Pool``.

::

    caller                                                   workers
      data ── put once ──────────────────────────────────►     views of one storage ─► fn ─┐
      (start, stop), (start, stop), … ── all that travels ─►                               ▼
      out ◄═════════════════════ the same shared memory ═══════════════════════════ written in place

The first batch runs alone if the output is not given, since its result tells the shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpool.arguments import check_func
from tpool.limits import POOL, PoolDefault, RetryOn
from tpool.local.batching import Batches, length_of, put_into
from tpool.maps import MapCall, MapCalls
from tpool.memory import MemoryCalls
from tpool.progress import Show

__all__ = ["BatchCalls"]


@dataclass(slots=True)
class _Plan:
    """One call of ``map_batches``."""

    data: Any
    dim: int
    length: int
    spans: list[tuple[int, int]]
    call: MapCall


class BatchCalls(MemoryCalls, MapCalls):
    """``map_batches``. Pools have this method; nothing else does."""

    def map_batches(
        self,
        func: Callable[[Any], Any],
        data: torch.Tensor | dict[Any, torch.Tensor],
        *,
        batch_size: int,
        dim: int = 0,
        out: torch.Tensor | dict[Any, torch.Tensor] | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> Any:
        """Call ``func(batch)`` for each batch of a big tensor; the results stand side by side in one tensor.

        The data move into shared memory once, in place; a batch is a view of them, and what ``func`` writes into it
        is seen by the caller. Each result is written into its place in the output by the worker. Nothing but numbers
        travels per batch. Results are detached from autograd.

        >>> images = torch.arange(10.0).reshape(5, 2)
        >>> with tpool.Pool(2) as pool:
        ...     pool.map_batches(torch.neg, images, batch_size=2)[4]
        tensor([-8., -9.])

        >>> def total(batch):
        ...     return {"sum": batch["x"] + batch["y"]}
        >>> with tpool.Pool(2) as pool:
        ...     pool.map_batches(total, {"x": torch.ones(5), "y": torch.ones(5)}, batch_size=2)
        {'sum': tensor([2., 2., 2., 2., 2.])}

        With ``sharing="copy"`` the workers read one copy of the data, and the caller's tensors stay apart.

        Args:
            func: gets a tensor, or a dict of tensors, of ``batch_size`` items or fewer at the end; returns a tensor
                with one entry for each item along ``dim``, a dict of such, or always None.
            data: what to go through: a dense tensor, or a dict of tensors of one length along ``dim``.
            batch_size: how many items a batch has.
            dim: along which to cut, and to put the results side by side.
            out: where to write them: a dense tensor on the CPU, or a dict of such. Made by ``pool.empty`` it is
                shared already; any other moves, in place. If not given, the first batch runs before all others, and
                its result tells what is needed.
            timeout: how many seconds a batch may take, until its worker is killed; see ``Pool``.
            retries: how often a batch is tried again; see ``Pool``.
            retry_on: after which exceptions.
            progress: see ``map``; counts batches, without the one that runs first.

        Returns:
            ``out``, or what was made in its place; None where ``func`` returns nothing, or there are no items.

        Raises:
            Exception: what the first batch to fail raised; the others still run.
            TypeError: an argument, or what ``func`` returned, is of the wrong kind.
            ValueError: an argument, or what ``func`` returned, is of the wrong size.
        """
        self._gate.check_running()
        limits = self._limits.override(timeout, retries, retry_on)
        check_func(func)
        length = length_of(data, dim, "data")
        if out is not None:
            _check_out(out, length, dim)
        size = _check_batch_size(batch_size)
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        call = MapCall("map_batches", func, limits, progress)
        plan = _Plan(self._engine.put(data), dim, length, spans, call)
        if out is None:
            return self._run_into_new(plan)
        self._run_into(plan, out)
        return out

    def _run_into_new(self, plan: _Plan) -> Any:
        """The output is made after the first result."""
        if not plan.spans:
            return None
        start, stop = plan.spans.pop(0)
        (first,) = self._run(plan, None, [(start, stop)])
        if first is None:
            out = None
        elif length_of(first, plan.dim, "what the function returns") != stop - start:
            found = length_of(first, plan.dim, "what the function returns")
            raise ValueError(f"the function returned {found} items along dimension {plan.dim} for {stop - start}")
        else:
            out = self._extended(first, plan)
        put_into(out, first, plan.dim, start, stop)
        del first
        self._run_into(plan, out)
        return out

    def _extended(self, first: Any, plan: _Plan) -> Any:
        """Room for the results of all batches, by that of the first."""
        if isinstance(first, dict):
            return {key: self._extended(part, plan) for key, part in first.items()}
        shape = list(first.shape)
        shape[plan.dim] = plan.length
        return self.empty(shape, dtype=first.dtype)

    def _run_into(self, plan: _Plan, out: Any) -> None:
        if out is not None and not self._engine.shares_memory:
            for (start, stop), value in zip(plan.spans, self._run(plan, None, plan.spans)):
                put_into(out, value, plan.dim, start, stop)
            return
        if self._engine.sharing == "share" or out is None:
            self._run(plan, self._engine.put(out), plan.spans)
            return
        # The caller's own tensors stay where they are.
        shared = {key: self.empty_like(t) for key, t in out.items()} if isinstance(out, dict) else self.empty_like(out)
        put_into(shared, out, plan.dim, 0, plan.length)  # of what the workers do not write, nothing may be lost
        self._run(plan, self._engine.put(shared, share=True), plan.spans)
        put_into(out, shared, plan.dim, 0, plan.length)

    def _run(self, plan: _Plan, out: Any, spans: list[tuple[int, int]]) -> list[Any]:
        batches = Batches(plan.call.func, plan.data, plan.dim, out, returns=out is None)
        values: list[Any] = self._wait_for_map(replace(plan.call, carrier=batches), spans, 1)
        return values


def _check_batch_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not hasattr(type(batch_size), "__index__"):
        raise TypeError(f"batch_size must be a number of items, not {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    return operator.index(batch_size)


def _check_out(out: Any, length: int, dim: int) -> None:
    found = length_of(out, dim, "out")
    if found != length:
        raise ValueError(f"out is of length {found} along dimension {dim}, and data of {length}")
    for tensor in out.values() if isinstance(out, dict) else [out]:
        if tensor.device.type != "cpu":
            raise ValueError(f"out must be on the CPU, where all workers can write into it, not on {tensor.device}")
