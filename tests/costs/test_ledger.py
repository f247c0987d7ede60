"""The ledger's formulas against the collectives of the compiled train step on 8 devices."""

import dataclasses
import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from lsgd_jax.costs.collectives import collectives
from lsgd_jax.costs.ledger import bytes_sent, exchanges, rounded_collectives
from lsgd_jax.distributed import SHARED
from lsgd_jax.exchange import broadcast_rounded
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.setup import prepare, rounds, step_key, steps_per_call
from lsgd_jax.train.step import init_state, local_steps
from tests.mapping import GROUPS, WORKERS, mapped
from tests.networks import WithOneLayer

DIGITS = dataclasses.replace(PRESETS["digits"], steps=8, eval_every=8, period=1, global_period=4)
GROUPED = DIGITS.replace(task=WithOneLayer("digits"))


def compiled_text(config):
    """The program's text, and the parameters."""
    placement, feed, model, optimizer = prepare(config)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    batch = next(rounds(feed, placement, config.steps, steps_per_call(config)))
    program = local_steps(config.task, model, optimizer, placement, feed)
    lowered = program.lower(state, shared, batch, np.int32(0), np.float32(1), step_key(0))
    return lowered.compile().as_text(), nnx.state(model, nnx.Param)


def compiled(config):
    """The collectives of the program beside its metrics', which every process is to have, and the parameters."""
    text, params = compiled_text(config)
    found = collectives(text)
    metrics = [each for each in found if each.kind == "all-gather" and not each.conditional]
    assert sum(each.bytes for each in metrics) <= 1100
    return [each for each in found if each not in metrics], params


def sizes(found):
    """Their bytes; a compiler may join collectives and part what it has joined."""
    total = Counter()
    for each in found:
        total[each.kind, each.group_size, each.times] += each.bytes
    return total


def check(config):
    found, params = compiled(config)
    expected = [each for exchange in exchanges(config, params) for each in (*exchange.collectives, *exchange.at_first)]
    assert sizes(found) == sizes(expected)
    assert all(each.conditional for each in found) or config.method == "data_parallel"


@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_sends(method):
    check(GROUPED.replace(method=method, eval_every=1))


WAYS = list(itertools.product(["all_reduce", "ring", "hierarchical"], [None, "bfloat16", "int8"], [0]))
WAYS += [("all_reduce", None, 1), ("ring", "int8", 1)]  # A delay changes when something is sent and not what.


@pytest.mark.parametrize(("broadcast", "wire", "delay"), WAYS)
def test_however_leaders_are_sent(broadcast, wire, delay):
    check(dataclasses.replace(GROUPED, broadcast=broadcast, wire=wire, delay=delay))


@pytest.mark.parametrize("wire", [None, "bfloat16", "int8"])
def test_arrays_of_every_kind_however_they_are_sent(wire):
    shapes = {"a": (3, 700), "b": (5,), "c": (), "d": (0, 4)}
    dtypes = {"a": np.float32, "b": np.complex64, "c": np.int32, "d": np.float16}
    tree = {name: np.zeros((GROUPS, WORKERS, *shapes[name]), dtypes[name]) for name in shapes}
    for method in ("all_reduce", "hierarchical"):

        def send(x, root, method=method):
            return broadcast_rounded(x, root, ("group", "worker"), wire=wire, last=x, method=method)

        program = mapped(send, "shard_map").lower(tree, np.zeros((GROUPS, WORKERS), np.int32)).compile()
        leaves = [jax.ShapeDtypeStruct(shapes[name], dtypes[name]) for name in shapes]
        expected = rounded_collectives(leaves, (GROUPS, WORKERS), method, wire)
        assert sizes(collectives(program.as_text())) == sizes(expected)


STREAMED = DIGITS.replace(period=3, global_period=6, eval_every=1, fragments=2)


@pytest.mark.parametrize(
    "changed",
    [
        {"overlap": 1},
        {"wire": "int8", "broadcast": "ring", "delay": 1, "stale_pull": 0.1},
        {"method": "diloco", "overlap": 1},
        {"method": "lgrawa", "fragments": 3},
        {"method": "quorum", "delay": 1},
    ],
    ids=str,
)
def test_what_is_sent_in_fragments(changed):
    check(STREAMED.replace(**changed))


def test_the_peak_is_that_of_the_largest_fragment():
    """Each fragment is sent in a branch of its own."""
    config = STREAMED.replace(method="local_sgd", fragments=3)
    text, params = compiled_text(config)
    head, *blocks = text.split("\n\n")
    branches = [collectives(f"{head}\n\nENTRY {block}") for block in blocks if block.startswith("%")]
    sent = [sum(each.sent for each in branch) for branch in branches if branch]
    by_formula = [exchange.bytes_sent for exchange in exchanges(config, params)]
    assert sorted(sent) == sorted(by_formula)
    [whole] = exchanges(config.replace(fragments=None), params)
    assert sum(sent) == whole.bytes_sent
    assert max(sent) < 0.6 * whole.bytes_sent


def test_bytes_of_fragments_by_formula():
    params = [jax.ShapeDtypeStruct((size,), np.float32) for size in (100, 50, 100)]
    config = GROUPED.replace(method="diloco", groups=1, workers=4, period=6, fragments=2)
    of_four = 2 * 3 / 4 * 4
    first, second = exchanges(config, params)
    assert (first.first, second.first) == (3, 6)
    assert (first.bytes_sent, second.bytes_sent) == (of_four * 150, of_four * 100)
    # An average of the starts comes before the first exchange of each fragment.
    assert [bytes_sent(config, params, steps) / of_four for steps in (2, 3, 6, 9)] == [0, 300, 500, 650]


def test_a_chain_has_a_branch_for_each_root():
    config = GROUPED.replace(groups=1, period=8, broadcast="chain")
    found, params = compiled(config)
    [exchange] = exchanges(config, params)
    permutes = [each for each in found if each.kind == "collective-permute"]
    in_loop = 8 * exchange.collectives[-1].sent * exchange.collectives[-1].times  # At most: due in one step of 8.
    assert sum(each.bytes * each.senders * each.times for each in permutes) == 4 * 4 * in_loop
    assert sizes([each for each in found if each not in permutes]) == {("all-reduce", 4, 8): 8}


def test_one_group_and_a_round_in_one_program():
    config = GROUPED.replace(groups=1, period=4, broadcast="hierarchical")
    found, params = compiled(config)
    [exchange] = exchanges(config, params)
    in_loop = [each._replace(times=4 * each.times) for each in exchange.collectives]  # At most: due in one step of 4.
    assert sizes(found) == sizes(in_loop)


def test_an_average_that_is_sent_in_other_numbers():
    """The differences are to an average that is sent as it is, once."""
    config, params = PRESETS["mnist1d"].replace(method="local_sgd"), jax.ShapeDtypeStruct((200,), np.float32)
    assert bytes_sent(config, params, 16) == 4 * 2 * 7 / 8 * 800
    assert bytes_sent(config.replace(wire="bfloat16"), params, 16) == 4 * 2 * 7 / 8 * 400 + 2 * 7 / 8 * 800
    with pytest.raises(ValueError, match=r"^wire must be bfloat16 or not given, got 'int8'\.$"):
        config.replace(wire="int8")


def test_bytes_by_formula():
    params = jax.ShapeDtypeStruct((200,), np.float32)
    grouped = dataclasses.replace(PRESETS["mnist1d"], period=2, global_period=8)  # 2 groups of 4.
    of_four, of_all = 2 * 3 / 4, 2 * 7 / 8
    assert bytes_sent(grouped, params, 16) == 8 * of_four * (800 + 8) + 2 * of_all * (800 + 8)
    single = grouped.replace(groups=1)
    assert bytes_sent(single, params, 17) == 8 * of_four * (800 + 8)
    assert bytes_sent(dataclasses.replace(single, wire="bfloat16"), params, 17) == 8 * of_four * (400 + 8)
    int8 = dataclasses.replace(single, wire="int8")
    assert bytes_sent(int8, params, 17) == 8 * of_four * (200 + 4 + 8)
    large = jax.ShapeDtypeStruct((3, 1000), np.float32)  # Each row in 4 blocks of 250.
    assert bytes_sent(int8, large, 2) == of_four * (3000 + 12 * 4 + 8)
    ring = dataclasses.replace(single, broadcast="ring")  # 200 numbers in 32 chunks of 7, 34 times.
    assert bytes_sent(ring, params, 17) == 8 * (of_four * 8 + 34 * 7 * 4)
    chain = dataclasses.replace(single, broadcast="chain")  # By three of the four.
    assert bytes_sent(chain, params, 17) == 8 * (of_four * 8 + 32 * 7 * 4 * 3 / 4)
    in_group = of_four * 8 + 34 * 7 * 4
    chains = dataclasses.replace(grouped, broadcast="chain", period=8)  # In a group it is a ring.
    assert bytes_sent(chains, params, 8) == in_group + of_all * 8 + 32 * 7 * 4 * 7 / 8
    between = dataclasses.replace(grouped, broadcast="hierarchical", period=8)  # 50 numbers between groups: 32 of 2.
    assert bytes_sent(between, params, 8) == in_group + of_all * 8 + 2 * 3 / 4 * 800 + 32 * 2 * 4
    assert bytes_sent(single.replace(method="data_parallel"), params, 16) == 16 * of_four * 800
    assert bytes_sent(single.replace(method="independent"), params, 16) == 0
    easgd = grouped.replace(method="easgd")
    assert bytes_sent(easgd, params, 16) == (8 + 1) * of_all * 800
    assert bytes_sent(easgd, params, 1) == 0
    assert bytes_sent(dataclasses.replace(easgd, method="mgrawa"), params, 2) == of_all * (800 + 4)
    quorum = single.replace(method="quorum", outer_momentum=0.0)  # An average, and a score for each of the four.
    assert bytes_sent(quorum, params, 16) == 8 * of_four * (800 + 4 * 4)
    assert bytes_sent(quorum.replace(outer_momentum=0.3), params, 1) == 0
    assert bytes_sent(quorum.replace(outer_momentum=0.3), params, 2) == of_four * (2 * 800 + 4 * 4)
    median = grouped.replace(method="coordinate_median")  # The others' parameters, and the number of the finite.
    assert bytes_sent(median, params, 2) == 7 * 800 + of_all * 4
    averaging = dataclasses.replace(single.replace(method="local_sgd"), wire="bfloat16")
    assert bytes_sent(averaging, params, 16) == of_four * (8 * 400 + 800)
