"""What the items of a stream take, against a model that counts anew each time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tpool.outstanding import Outstanding

PIECES = st.lists(st.sampled_from([(0, 100), (0, 300), (64, 5000), (128, 7)]), max_size=3)
STEPS = st.lists(st.tuples(st.integers(0, 50), PIECES) | st.integers(0, 6), max_size=40)


def weight(items):
    return sum(own for own, _ in items) + sum(
        nbytes for _, nbytes in {piece for _, pieces in items for piece in pieces}
    )


@settings(deadline=None)
@given(STEPS)
def test_each_piece_counts_once(steps):
    outstanding, items, added = Outstanding(), [], []
    for step in steps:
        if isinstance(step, int):
            outstanding.keep(step)
            first = min(len(items) - 1, len(items) - step)
            items, added = items[max(0, first) :], added[max(0, first) :]
        else:
            added.append(weight([*items, step]) - weight(items))
            items.append(step)
            outstanding.add(*step)
        assert outstanding.nbytes == weight(items)
        assert outstanding.mean_nbytes == (sum(added) // len(added) if added else 0)


def test_what_is_sent_again_is_expected_again():
    """The first of them is new; once it was consumed, nothing speaks for another new one."""
    outstanding = Outstanding()
    outstanding.add(10, [(64, 5000)])
    outstanding.add(10, [(64, 5000)])
    assert (outstanding.nbytes, outstanding.mean_nbytes) == (5020, 2510)
    outstanding.keep(1)
    assert (outstanding.nbytes, outstanding.mean_nbytes) == (5010, 10)
