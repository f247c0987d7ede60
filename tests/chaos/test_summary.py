"""The summary of a run that is made up: worker 0 is left alone, worker 1 is stopped, worker 2 is killed."""

import pytest

from lsgd_jax.chaos.summary import Span, summarize

STOP = {"kind": "stop", "time": 110.0, "seconds": 5.0, "hit": [{"worker": 1, "life": 1}]}
KILL = {"kind": "kill", "time": 120.0, "seconds": 0.0, "hit": [{"worker": 2, "life": 1}]}


def start(worker, life, time, step):
    return {"event": "start", "worker": worker, "life": life, "time": time, "step": step}


def exchanges(worker, life, times, steps):
    event = {"event": "exchange", "worker": worker, "life": life}
    return [event | {"time": float(time), "worker_step": step} for time, step in zip(times, steps, strict=True)]


def dead(worker, life, seconds, seen_by):
    return {"event": "dead", "worker": worker, "life": life, "seconds": seconds, "seen_by": seen_by}


def events():
    """A step per second and worker, from second 100 on; worker 0 waits from 130 to 133."""
    return [
        *(start(worker, 1, 100.0, 0) for worker in range(3)),
        *exchanges(0, 1, [*range(102, 132, 2), *range(135, 141, 2)], range(2, 38, 2)),
        *exchanges(1, 1, [*range(102, 112, 2), *range(117, 141, 2)], range(2, 36, 2)),
        *exchanges(2, 1, range(102, 122, 2), range(2, 22, 2)),
        start(2, 2, 130.0, 18),
        *exchanges(2, 2, [132, 134, 140], [20, 22, 28]),
        dead(1, 1, 111.0, 0),
        dead(2, 1, 106.0, 0),
        dead(2, 1, 120.25, 0),
        dead(2, 1, 120.75, 1),
        {"event": "evaluation", "step": 12, "center_error": 0.125},
    ]


def test_a_run_is_summed_up():
    found = summarize(events(), [STOP, KILL], quiet=10.0, measure="error")
    assert (found.workers, found.seconds, found.faults) == (3, 40.0, {"stop": 1, "kill": 1})
    assert found.noticed == Span(2, 0.5, 0.75)
    assert (found.back, found.away) == (Span(1, 10.0, 10.0), 0)
    assert found.lost == [2]
    assert found.stalls == Span(1, 3.0, 3.0)  # Five seconds for two steps.
    assert (found.ended, found.wrong, found.error) == ([], 1, 0.125)  # Worker 2, at second 106.
    assert found.steps == 36 + 34 + 28
    assert found.quiet_throughput == pytest.approx(3.0)
    assert found.throughput == pytest.approx((26 + 24 + 18) / 30 / 3)
    assert found.living == pytest.approx((29 + 24 + 20) / (3 * 30))


def test_what_no_fault_explains_is_told():
    found = summarize([*events(), dead(1, 1, 139.0, 0)], [STOP], quiet=10.0, measure="error")
    assert found.ended == ["worker 2 in life 1"]
    assert found.wrong == 4  # Worker 2, three times, and worker 1 at second 139.
    partition = {"kind": "partition", "time": 105.0, "seconds": 30.0, "hit": [{"worker": 0, "life": 1}]}
    found = summarize([*events(), dead(1, 1, 139.0, 0)], [STOP, partition], quiet=10.0, measure="error")
    assert (found.ended, found.wrong) == (["worker 2 in life 1"], 0)


def test_who_is_not_back_is_away():
    killed = [event for event in events() if event.get("life") != 2]
    found = summarize(killed, [STOP, KILL], quiet=10.0, measure="error")
    assert (found.back, found.away, found.lost) == (Span(0, None, None), 1, [])
    assert found.living == pytest.approx((29 + 24 + 10) / (3 * 29))


def test_a_life_that_ended_before_it_trained_is_passed_over():
    renumbered = [event | {"life": 3} if event.get("life") == 2 else event for event in events()]
    again = {"kind": "kill", "time": 125.0, "seconds": 0.0, "hit": [{"worker": 2, "life": 2}]}
    found = summarize(renumbered, [STOP, KILL, again], quiet=10.0, measure="error")
    assert (found.back, found.away, found.lost, found.ended) == (Span(1, 10.0, 10.0), 0, [2], [])


def test_who_is_killed_again_before_it_trains_is_counted_from_the_first_kill():
    again = KILL | {"time": 124.0}  # Before its second life has begun, and then in it: the third one trains.
    unborn = KILL | {"time": 127.0, "hit": [{"worker": 2, "life": 2}]}
    later = [event | {"life": 3} if event.get("life") == 2 else event for event in events()]
    found = summarize(later, [STOP, KILL, again, unborn], quiet=10.0, measure="error")
    assert (found.back, found.away, found.lost) == (Span(1, 10.0, 10.0), 0, [2])
    assert (found.noticed, found.ended) == (Span(2, 0.5, 0.75), [])


def test_the_summary_is_a_table():
    table = summarize(events(), [STOP, KILL], quiet=10.0, measure="error").table("test error").splitlines()
    assert [line.split("  ")[0] for line in table] == [
        "workers",
        "faults",
        "deaths noticed after",
        "replacements trained after",
        "stalls of survivors",
        "died although nothing was done",
        "taken for dead although nothing was done",
        "steps",
        "throughput without faults",
        "throughput with faults",
        "test error",
    ]
    assert "0.50 s (median of 2), at most 0.75 s" in table[2]
    assert table[-1].endswith(" 0.125")
