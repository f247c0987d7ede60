"""The arrays of many workers against the event queue, to the nanosecond."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import LATEST, SCHEDULES, SECOND, Cluster, event_log, throughput, totals

PARAMS = np.zeros(1000, np.float32)


@st.composite
def clusters(draw):
    return Cluster(
        step_seconds=0.01,
        slow=((0, draw(st.sampled_from([1.0, 2.0, 10.0]))),),
        variation=draw(st.sampled_from(["none", "lognormal", "pareto"])),
        varies_by=draw(st.sampled_from(["step", "worker"])),
        pause_every=draw(st.sampled_from([None, 3])),
        pause_seconds=0.05,
        local_latency=draw(st.sampled_from([0.0, 1e-3])),
        local_bandwidth=draw(st.sampled_from([1e6, 1e9, float("inf")])),
        global_latency=draw(st.sampled_from([0.0, 3e-3])),
        global_bandwidth=draw(st.sampled_from([3e5, float("inf")])),
        servers=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=40)
@given(
    cluster=clusters(),
    groups=st.integers(1, 3),
    workers=st.integers(1, 4),
    period=st.integers(1, 3),
    ratio=st.integers(1, 3),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_the_same_to_the_nanosecond(name, cluster, groups, workers, period, ratio, rounds, seed):
    config = dataclasses.replace(
        PRESETS["digits"],
        groups=groups,
        workers=workers,
        period=period,
        global_period=period * ratio if groups > 1 else None,
        steps=period * ratio * rounds,
        seed=seed,
    )
    log = event_log(SCHEDULES[name], config, cluster, PARAMS)
    assert throughput(SCHEDULES[name], config, cluster, PARAMS) == totals(log)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=20)
@given(
    cluster=clusters(),
    seconds=st.floats(3, 9),
    variation=st.sampled_from([{}, {"variation": "pareto", "tail": 0.3}, {"variation": "lognormal", "sigma": 1e3}]),
    bandwidth=st.sampled_from([1e-3, 1e-2, 1e6]),
)
def test_both_end_where_virtual_time_does(name, cluster, seconds, variation, bandwidth):
    config = dataclasses.replace(PRESETS["digits"], groups=2, workers=2, period=2, global_period=4, steps=8)
    cluster = dataclasses.replace(cluster, step_seconds=10**seconds, global_bandwidth=bandwidth, **variation)
    results = []
    for simulate in (lambda *given: totals(event_log(*given)), throughput):
        try:
            results.append(simulate(SCHEDULES[name], config, cluster, PARAMS))
        except UsageError as error:
            results.append(str(error))
    assert results[0] == results[1]
    if not isinstance(results[0], str):
        assert 0 < results[0].nanoseconds < LATEST
        assert 0 <= results[0].efficiency <= 1


def test_many_workers_wait_for_more_nanoseconds_than_64_bits_count():
    config = dataclasses.replace(PRESETS["digits"], groups=1, workers=128, period=4, steps=4)
    cluster = Cluster(1e7, slow=((0, 10.0),))
    of = throughput(SCHEDULES["local_sgd"], config, cluster, PARAMS)
    assert of == totals(event_log(SCHEDULES["local_sgd"], config, cluster, PARAMS))
    assert of.waiting == 127 * 4 * 9 * 10**7 * SECOND > 2**63


@pytest.mark.parametrize("name", ["lsgd-joined", "lsgd-posted", "easgd"])
def test_the_same_for_many_workers_before_servers_with_long_queues(name):
    config = dataclasses.replace(PRESETS["digits"], groups=2, workers=80, period=2, global_period=4, steps=12)
    cluster = Cluster(0.01, slow=((3, 10.0),), variation="lognormal", global_bandwidth=3e7)
    log = event_log(SCHEDULES[name], config, cluster, PARAMS)
    of = throughput(SCHEDULES[name], config, cluster, PARAMS)
    assert of == totals(log)
    if SCHEDULES[name].waits == "server":
        assert of.waiting > 0.5 * of.workers * of.nanoseconds
