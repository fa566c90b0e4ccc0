"""A module imports only from rows above its own; DESIGN's order, checked in the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tpool"

# From the ground up. Modules of one row may not import each other.
ROWS = [
    ["tpool.errors", "tpool.local.deathwatch", "tpool.local.interpreter", "tpool.tensors.cures", "tpool.waiting"],
    ["tpool.task", "tpool.outstanding", "tpool.values"],
    ["tpool.basket", "tpool.messages"],
    ["tpool.inbox", "tpool.deadlines", "tpool.limits", "tpool.roster"],
    ["tpool.dispatch"],
    ["tpool.jobs", "tpool.slots"],
    ["tpool.killing"],
    ["tpool.scheduler"],
    ["tpool.tensors.budget", "tpool.tensors.heap", "tpool.tensors.memfd", "tpool.tensors.forks"],
    ["tpool.tensors.extents", "tpool.tensors.ledger", "tpool.tensors.prefault"],
    ["tpool.tensors.free_memory"],
    ["tpool.tensors.arena"],
    ["tpool.tensors.entries"],
    ["tpool.tensors.block_table"],
    ["tpool.tensors.housekeeping"],
    ["tpool.tensors.lease_table"],
    ["tpool.tensors.ageing"],
    ["tpool.tensors.leases"],
    ["tpool.tensors.descriptors", "tpool.tensors.payload", "tpool.tensors.torch_private"],
    ["tpool.tensors.slabs"],
    ["tpool.tensors.arrivals", "tpool.tensors.moving", "tpool.tensors.token"],
    ["tpool.tensors.held", "tpool.tensors.storages"],
    ["tpool.tensors.reducers_layouts"],
    ["tpool.tensors.reducers_content"],
    ["tpool.tensors.placed"],
    ["tpool.tensors.reducers_alike", "tpool.tensors.reducers_subclasses"],
    ["tpool.tensors.reducers"],
    ["tpool.tensors.bare"],
    ["tpool.tensors.names"],
    ["tpool.tensors.byvalue"],
    ["tpool.tensors.catalogue", "tpool.tensors.registry"],
    ["tpool.tensors.groups"],
    ["tpool.tensors.definitions"],
    ["tpool.tensors.unpickler", "tpool.tensors.plain"],
    ["tpool.tensors.pickler"],
    [
        "tpool.local.cpus",
        "tpool.local.channel",
        "tpool.local.encodings",
        "tpool.local.forkmark",
        "tpool.local.outbox",
        "tpool.local.patience",
        "tpool.local.trace",
        "tpool.local.retirement",
        "tpool.local.stacks",
        "tpool.local.answers",
        "tpool.local.batching",
        "tpool.local.faltering",
        "tpool.local.seeding",
        "tpool.local.starring",
        "tpool.local.story",
        "tpool.local.weight",
        "tpool.ray.codec",
        "tpool.ray.journal",
        "tpool.ray.private",
        "tpool.ray.spec",
    ],
    [
        "tpool.local.crew",
        "tpool.local.wire",
        "tpool.local.lifetime",
        "tpool.local.logs",
        "tpool.local.seat",
        "tpool.ray.cluster",
        "tpool.ray.parcels",
    ],
    ["tpool.local.identity"],
    ["tpool.local.calls", "tpool.local.replies", "tpool.ray.answers"],
    ["tpool.local.outcomes", "tpool.local.spans"],
    ["tpool.local.worker", "tpool.ray.tasks"],
    ["tpool.local.process", "tpool.ray.actor"],
    ["tpool.local.zygote"],
    ["tpool.local.shared_zygote"],
    ["tpool.local.launch"],
    ["tpool.local.setup"],
    ["tpool.engine", "tpool.ray.settings"],
    ["tpool.local.orders", "tpool.ray.member"],
    ["tpool.local.member", "tpool.ray.looks", "tpool.ray.orders"],
    ["tpool.local.hunger", "tpool.local.lingering", "tpool.local.loans", "tpool.local.poller"],
    ["tpool.local.encoding", "tpool.local.lending"],
    ["tpool.local.looks", "tpool.ray.starting"],
    ["tpool.local.engine", "tpool.ray.engine"],
    ["tpool.ray.making"],
    ["tpool.timeline.columns", "tpool.timeline.spans"],
    ["tpool.timeline.chrome", "tpool.timeline.picture"],
    ["tpool.timeline.timeline"],
    ["tpool.results", "tpool.stats"],
    ["tpool.failures", "tpool.loops"],
    ["tpool.futures", "tpool.streams"],
    ["tpool.map_result"],
    ["tpool.progress"],
    ["tpool.handler"],
    ["tpool.direct", "tpool.feeder", "tpool.gate", "tpool.report", "tpool.tracing"],
    ["tpool.arguments", "tpool.opening"],
    ["tpool.options"],
    ["tpool.engines", "tpool.executor", "tpool.maps"],
    ["tpool.imaps", "tpool.memory"],
    ["tpool.batches", "tpool.seeing", "tpool.sizing"],
    ["tpool.pool"],
    ["tpool"],
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
PACKAGES = {"tpool.tensors", "tpool.local", "tpool.ray", "tpool.timeline"}
# What a pure module may not touch.
IMPURE = {"os", "time", "threading", "torch", "logging", "socket", "select", "multiprocessing"}
PURE_NAMES = ["errors", "messages", "deadlines", "roster", "dispatch", "jobs", "killing", "slots", "scheduler"]
PURE = [f"tpool.{name}" for name in PURE_NAMES]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; ``from tpool.local import wire`` counts as the submodule."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules
            if len(submodules) < len(names):
                found.add(node.module)
    return found


def test_every_module_has_a_row():
    assert MODULES.keys() - PACKAGES == ROW_OF.keys()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PACKAGES))
def test_imports_only_from_rows_above(name):
    inside = {found for found in imports(MODULES[name]) if found == "tpool" or found.startswith("tpool.")}
    too_high = {found for found in inside if ROW_OF.get(found, -1) >= ROW_OF[name]}
    assert not too_high


@pytest.mark.parametrize("name", PURE)
def test_the_scheduler_is_pure(name):
    assert not {found.partition(".")[0] for found in imports(MODULES[name])} & IMPURE


def test_nothing_of_the_standard_librarys_pool():
    for path in MODULES.values():
        assert "multiprocessing.pool" not in imports(path), path


def test_modules_stay_small():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
