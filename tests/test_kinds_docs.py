"""The docs tell what the tests show."""

from __future__ import annotations

import kinds
import pytest
from kinds import DOCS, KINDS, docs_table, docs_with_table


def test_the_table_of_kinds_in_the_docs_is_the_one_that_is_tested() -> None:
    assert DOCS.read_text() == docs_with_table(), "run: python tests/kinds.py"


def test_a_stale_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", KINDS[:-1])
    assert DOCS.read_text() != docs_with_table()


def test_every_group_has_kinds_and_every_kind_stands_in_the_docs() -> None:
    table = docs_table()
    assert {kind.group for kind in KINDS} == set(kinds.GROUPS)
    assert all(f"| {kind.name} |" in table for kind in KINDS)
    assert {kind.status for kind in KINDS} == {"exact", "changed", "refused"}


def test_no_kind_is_claimed_to_work_on_a_gpu() -> None:
    rows = [row for row in docs_table().splitlines() if "CUDA" in row and not row.startswith("| **")]
    assert rows
    assert all("| untested |" in row for row in rows)
