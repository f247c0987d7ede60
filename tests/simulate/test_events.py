"""The event queue: limiting cases with known times, conservation, comings and goings."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import SCHEDULES, SECOND, Cluster, StepTimes, event_log, throughput, totals

PARAMS = np.zeros(1000, np.float32)
CONFIG = dataclasses.replace(PRESETS["digits"], groups=1, workers=4, steps=12, period=4)
FREE = Cluster(
    local_latency=0.0, global_latency=0.0, local_bandwidth=float("inf"), global_bandwidth=float("inf"), step_seconds=0.1
)
STRAGGLER = dataclasses.replace(FREE, slow=((2, 10.0),))


def run(name, cluster=FREE, **changes):
    log = event_log(SCHEDULES[name], dataclasses.replace(CONFIG, **changes), cluster, PARAMS)
    return log, totals(log)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_speeds_and_free_links_take_the_time_of_the_steps(name, groups):
    log, of = run(name, groups=groups, workers=4 // groups)
    assert log.end == 12 * SECOND // 10
    assert (of.waiting, of.exchanging, of.efficiency) == (0, 0, 1.0)
    assert set(of.staleness) == {1 if name == "data_parallel" else 4}


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_worker_never_waits(name):
    _, of = run(name, workers=1, cluster=dataclasses.replace(FREE, variation="lognormal"))
    assert of.waiting == of.exchanging == 0
    assert set(of.staleness) == {0}


def test_in_step_all_wait_for_the_straggler_and_for_the_links():
    latency, size = 0.01, PARAMS.nbytes
    cluster = dataclasses.replace(STRAGGLER, local_latency=latency, local_bandwidth=8e5)
    log, _ = run("local_sgd", cluster)
    exchange = 4 * latency + 2 * 3 / 4 * size / 1e5  # Two doublings there and back.
    assert log.end == pytest.approx((12 * 1.0 + 2 * exchange) * SECOND, abs=2)


def test_joined_waits_for_the_step_at_hand_only():
    log, of = run("lsgd-joined", STRAGGLER)
    # The others are at their fifth step together, 5 + 0 + 5 + 5 < 16; at the sixth the sum is 18.
    first = next(event for event in log.events if event.kind == "exchange")
    assert first.time == SECOND
    assert sorted(first.begun) == [600_000_000] * 3 + [SECOND]
    assert of.efficiency > 2 * run("lsgd", STRAGGLER)[1].efficiency


@pytest.mark.parametrize("name", ["lsgd-posted", "easgd", "downpour"])
def test_nobody_waits_but_for_the_server(name):
    _, of = run(name, STRAGGLER)
    assert of.waiting == 0
    assert of.nanoseconds == 48 * SECOND // 31 // 10**8 * 10**8 + 10**8  # 31 steps a second, in whole tenths.


def test_a_server_serves_one_after_the_other():
    seconds = 8 * PARAMS.nbytes / 1e5
    log, _ = run("easgd", dataclasses.replace(FREE, local_bandwidth=1e5), steps=8)
    served = [event.time for event in log.events if event.kind == "exchange"][:4]
    assert np.diff(served).tolist() == [round(seconds * SECOND)] * 3
    several = dataclasses.replace(FREE, local_bandwidth=1e5, servers=4)
    served = [event.time for event in run("easgd", several, steps=8)[0].events if event.kind == "exchange"][:4]
    assert np.diff(served).tolist() == [round(seconds * SECOND) // 4] * 3


@pytest.mark.parametrize("name", ["lsgd", "local_sgd", "data_parallel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_step_the_ledger_tells_the_bytes(name, groups):
    config = CONFIG.replace(groups=groups, workers=4, steps=16)
    if groups > 1:
        config = config.replace(global_period=8)
    config = config.replace(method=SCHEDULES[name].method)
    of = totals(event_log(SCHEDULES[name], config, Cluster(), PARAMS))
    shape = jax.ShapeDtypeStruct(PARAMS.shape, PARAMS.dtype)
    assert of.bytes_sent == pytest.approx(bytes_sent(config, shape, 16) * groups * 4)


@pytest.mark.parametrize("name", ["lsgd", "local_sgd"])
def test_fragments_send_the_same_in_smaller_exchanges(name):
    params = [np.zeros(400, np.float32), np.zeros(600, np.float32)]
    config = dataclasses.replace(CONFIG, method=name, groups=2, global_period=8 if name == "lsgd" else None, steps=16)
    whole, streamed = (
        totals(event_log(SCHEDULES[name], each, Cluster(), params)) for each in (config, config.replace(fragments=2))
    )
    assert streamed == throughput(SCHEDULES[name], config.replace(fragments=2), Cluster(), params)
    assert streamed.exchanges == tuple(2 * count for count in whole.exchanges)
    assert streamed.bytes_sent == pytest.approx(bytes_sent(config.replace(fragments=2), params, 16) * 8)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lsgd", {"fragments": 2, "period": 5}, "fragments must divide the period, 5, in a simulation, got 2"),
        ("lsgd", {"overlap": 1}, "overlap is not simulated: leave it out, got 1"),
        ("easgd", {"fragments": 2}, "fragments are simulated for lsgd, local_sgd, diloco and quorum"),
        ("lsgd-joined", {"fragments": 2}, "fragments are simulated for lsgd, local_sgd, diloco and quorum"),
    ],
)
def test_streaming_that_is_not_simulated(name, changed, message):
    for simulate in (event_log, throughput):
        with pytest.raises(UsageError, match=message):
            simulate(SCHEDULES[name], dataclasses.replace(CONFIG, **changed), Cluster(), PARAMS)


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    groups=st.integers(1, 3),
    absences=st.lists(
        st.tuples(st.integers(0, 2), st.floats(0, 1.5), st.one_of(st.floats(0.01, 1.5), st.just(float("inf")))),
        max_size=4,
    ),
    seed=st.integers(0, 3),
)
def test_what_is_conserved_whoever_comes_and_goes(name, groups, absences, seed):
    absences = tuple((worker, start, start + length) for worker, start, length in absences)
    cluster = Cluster(variation="lognormal", local_latency=0.01, global_latency=0.02, absences=absences)
    config = CONFIG.replace(groups=groups, workers=3, period=2, seed=seed)
    if groups > 1:
        config = config.replace(global_period=4)
    log = event_log(SCHEDULES[name], config, cluster, PARAMS)
    assert log == event_log(SCHEDULES[name], config, cluster, PARAMS)
    of = totals(log)
    assert of.steps == sum(event.kind == "step" for event in log.events)
    assert of.steps >= groups * 3 * 12 or groups == 1  # The others go on; of one group all may be gone.
    assert [event.time for event in log.events] == sorted(event.time for event in log.events)
    exchanges = [event for event in log.events if event.kind == "exchange"]
    sent = sum(len(event.workers) * log.costs[event.level] for event in exchanges)
    assert of.bytes_sent == pytest.approx(sent)
    # What every worker does follows upon what it did before.
    until = dict.fromkeys(range(log.workers), 0)
    away = set()
    for event in log.events:
        for worker, begun in zip(event.workers, event.begun, strict=True):
            assert worker not in away or event.kind in ("join", "exchange")
            if event.kind == "step":
                assert begun == until[worker]
            if event.kind in ("step", "exchange", "join"):
                until[worker] = max(event.end, begun) if event.kind != "step" else event.time
            (away.add if event.kind == "leave" else away.discard if event.kind == "join" else lambda w: None)(worker)


@pytest.mark.parametrize(("name", "steps"), [("lsgd", 2), ("lsgd-joined", 4)])
def test_time_goes_on_when_the_one_that_is_waited_for_leaves(name, steps):
    """The first worker has waited for the other group after so many steps."""
    cluster = dataclasses.replace(FREE, slow=((1, 100.0),), absences=((1, 1.5, math.inf),))
    log, of = run(name, cluster, groups=2, workers=1, period=2, global_period=2, steps=6)
    assert log.end == (15 + 12 - steps) * SECOND // 10
    assert of.waiting == (15 - steps) * SECOND // 10


def test_step_times():
    everyone, none = np.arange(20_000), np.zeros(20_000, int)
    lognormal = StepTimes(Cluster(variation="lognormal", sigma=0.5), 20_000, seed=1)
    logs = np.log(lognormal(everyone, none) / (SECOND / 10))
    assert abs(logs.mean()) < 0.02
    assert logs.std() == pytest.approx(0.5, rel=0.03)
    pareto = StepTimes(Cluster(variation="pareto", tail=3.0), 20_000, seed=1)(everyone, none) / (SECOND / 10)
    assert pareto.min() >= 1
    assert (pareto > 2).mean() == pytest.approx(1 / 8, rel=0.1)
    by_worker = StepTimes(Cluster(variation="pareto", varies_by="worker"), 3, seed=1)
    assert np.array_equal(by_worker(np.arange(3), np.zeros(3, int)), by_worker(np.arange(3), np.full(3, 7)))
    pauses = StepTimes(Cluster(pause_every=5, pause_seconds=2.0), 2, seed=0)
    times = np.array([pauses(np.array([i] * 10), np.arange(10)) for i in range(2)])
    assert ((times == 21 * SECOND // 10).sum(1) == 2).all()


def test_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("0.1, 0.2\n0.3, 0.4\n")
    times = StepTimes(Cluster(trace=path), 3, seed=0)
    assert times(np.array([0, 1, 2, 1]), np.array([0, 1, 3, 2])).tolist() == [10**8, 4 * 10**8, 3 * 10**8, 2 * 10**8]
    path.write_text("0.1 fast\n")
    with pytest.raises(UsageError, match="positive durations"):
        StepTimes(Cluster(trace=path), 3, seed=0)
    with pytest.raises(UsageError, match="can't be read"):
        StepTimes(Cluster(trace=tmp_path / "none"), 3, seed=0)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="step_seconds must be positive"):
        Cluster(step_seconds=-1.0)
    with pytest.raises(ValueError, match="absences"):
        Cluster(absences=((0, 2.0, 1.0),))
    with pytest.raises(UsageError, match="there is no worker 4"):
        run("lsgd", Cluster(slow=((4, 2.0),)))
    with pytest.raises(ValueError, match="need an event log"):
        throughput(SCHEDULES["lsgd"], CONFIG, Cluster(absences=((0, 1.0, math.inf),)), PARAMS)
    with pytest.raises(ValueError, match="a multiple of 4"):
        throughput(SCHEDULES["lsgd"], dataclasses.replace(CONFIG, steps=10), Cluster(), PARAMS)
