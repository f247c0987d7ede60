"""Faults and plans of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsgd_jax.chaos import Fault, plan, read_plan
from lsgd_jax.chaos.faults import KINDS, LEADER
from lsgd_jax.errors import UsageError


@given(st.integers(2, 9), st.integers(0, 999))
def test_a_random_plan_is_read_as_it_is_written(processes, seed):
    options = {"seconds": 1800, "per_hour": 120, "quiet": 180}
    faults = plan(processes, **options, seed=seed)
    assert faults == plan(processes, **options, seed=seed)
    assert [Fault.parse(str(fault), processes) for fault in faults] == faults
    assert all(180 < fault.at < 1800 for fault in faults)
    assert all(set(fault.processes) <= {LEADER, *range(processes)} for fault in faults)
    assert all(0 < len(fault.processes) < processes for fault in faults)
    assert all((fault.seconds > 0) == KINDS[fault.kind] for fault in faults)


def test_random_faults_are_as_many_as_asked_for_and_of_all_kinds():
    faults = plan(8, seconds=100 * 3600, per_hour=12, quiet=0, seed=0)
    assert 1100 < len(faults) < 1300
    assert {fault.kind for fault in faults} == set(KINDS)
    kills = {fault.processes for fault in faults if fault.kind == "kill"}
    assert kills >= {(LEADER,), (0,), (7,)}
    assert max(map(len, kills)) == 7
    assert plan(8, seconds=3600, per_hour=0, quiet=0, seed=0) == []


def test_a_file_has_a_fault_per_line(tmp_path):
    (tmp_path / "plan").write_text("# As an example\n20 stop 0,2 2.5\n\n12.5 kill leader\n30 disk 1 1\n")
    assert read_plan(tmp_path / "plan", 3) == [
        Fault(12.5, "kill", (LEADER,)),
        Fault(20.0, "stop", (0, 2), 2.5),
        Fault(30.0, "disk", (1,), 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1 burn 0", "a fault is one of kill, stop, partition, slow, disk"),
        ("1 kill 3", "processes are numbered from 0 to 2"),
        ("1 kill 0 2", "kill has no seconds that it lasts"),
        ("1 stop 0", "stop takes seconds that it lasts"),
        ("-1 kill 0", "seconds are not negative"),
        ("nan kill 0", "seconds are not negative"),
        ("1 stop 0 1 2", "it has three words, and a fourth if it lasts"),
        ("1", "it has three words"),
        ("1 kill first", "invalid literal"),
    ],
)
def test_any_other_line_is_one_sentence(line, why, tmp_path):
    (tmp_path / "plan").write_text(f"1 kill 0\n{line}\n")
    with pytest.raises(UsageError, match=f"line 2 of .* is not a fault like .*{why}"):
        read_plan(tmp_path / "plan", 3)


def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"the plan .* can't be read"):
        read_plan(tmp_path / "none", 3)
