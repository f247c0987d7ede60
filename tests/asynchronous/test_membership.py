"""What processes know of each other, in whatever order they hear it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsgd_jax.asynchronous import membership
from lsgd_jax.asynchronous.membership import Entry

COUNTS = st.integers(0, 3)
ENTRIES = st.builds(
    Entry,
    life=st.integers(1, 3),
    beat=COUNTS,
    since=st.floats(0, 1),
    address=st.sampled_from(["a:1", "[::1]:2"]),
    posted_step=st.integers(-1, 3),
    score=st.floats(allow_nan=False),
    eligible=st.booleans(),
    step=COUNTS,
)
VIEWS = st.dictionaries(COUNTS, ENTRIES)


@given(VIEWS, VIEWS, VIEWS)
def test_all_come_to_the_same_view(one, two, three):
    merge = membership.merge
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    assert merge(one, one) == one
    assert merge(merge(one, two), two) == merge(one, two)


@given(st.lists(VIEWS))
def test_steps_never_fall_and_an_old_life_never_returns(heard):
    view = {}
    for other in heard:
        before, view = view, membership.merge(view, other)
        assert view.keys() == before.keys() | other.keys()
        for position, entry in view.items():
            known = [of[position] for of in (before, other) if position in of]
            assert entry.step == max(e.step for e in known)
            assert entry[:2] == max(e[:2] for e in known)
            assert any(entry._replace(step=e.step) == e for e in known)  # Nothing is mixed but the steps.


@given(VIEWS)
def test_a_view_is_what_was_sent(view):
    assert membership.parse(json.loads(json.dumps(membership.dump(view)))) == view


@pytest.mark.parametrize(
    "change",
    [
        {0: -1},
        {0: True},
        {1: 0},
        {1: 1.5},
        {2: 10**30},
        {3: float("inf")},
        {4: "a:1\n"},
        {4: "no address"},
        {5: -2},
        {6: float("nan")},
        {6: None},
        {7: 1},
        {8: "1"},
    ],
)
def test_what_is_not_a_view_is_refused(change):
    entry = [0, 1, 2, 3.0, "a:1", 4, 5.0, True, 6]
    assert membership.parse([entry])
    for place, value in change.items():
        entry[place] = value
    with pytest.raises(ValueError, match=r"^not a worker of a view: \["):
        membership.parse([entry])


@pytest.mark.parametrize("value", [None, {}, "view", [[]] * (membership.MOST_WORKERS + 1)])
def test_what_is_not_a_list_of_workers_is_refused(value):
    with pytest.raises(ValueError, match=r"^a view must be a list of at most 65536 workers$"):
        membership.parse(value)
