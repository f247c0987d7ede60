"""The arrays of many workers against the event queue, to the nanosecond."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import SCHEDULES, Cluster, event_log, throughput, totals

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
@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize("name", ["lsgd-joined", "lsgd-posted", "easgd"])
def test_the_same_for_many_workers_before_servers_with_long_queues(name):
    config = dataclasses.replace(PRESETS["digits"], groups=2, workers=80, period=2, global_period=4, steps=12)
    cluster = Cluster(0.01, slow=((3, 10.0),), variation="lognormal", global_bandwidth=3e7)
    log = event_log(SCHEDULES[name], config, cluster, PARAMS)
    of = throughput(SCHEDULES[name], config, cluster, PARAMS)
    assert of == totals(log)
    if SCHEDULES[name].waits == "server":
        assert of.waiting > 0.5 * of.workers * of.nanoseconds
