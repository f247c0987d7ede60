"""What workers hold, against compiled programs and by hand."""

import pytest

from lsgd_jax.costs.memory import memory, table
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.compile_ahead import compile_steps, lowered_steps
from lsgd_jax.train.setup import place_workers

SMALL = PRESETS["digits"].replace(groups=1, workers=2, period=2, eval_every=2)
PARAMETERS = 4 * 8970


def arguments(config):
    return compile_steps(lowered_steps(config, place_workers(config))).memory_analysis().argument_size_in_bytes


def test_methods_differ_by_as_much_as_their_compiled_programs_take():
    configs = [SMALL.replace(method="easgd"), SMALL.replace(delay=1, window=3), SMALL.replace(local_optimizer="adamw")]
    compiled = [arguments(config) - sum(memory(config)) for config in configs]
    assert compiled[0] == compiled[1] == compiled[2]  # The data, which are the same.


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"method": "local_sgd"}, 0),
        ({"method": "local_sgd", "delay": 1}, 1),
        ({"method": "lsgd"}, 0),
        ({"method": "lsgd", "delay": 1}, 1),
        ({"method": "lsgd", "wire": "int8"}, 1),
        ({"method": "lsgd", "stale_pull": 0.1}, 1),
        ({"method": "easgd"}, 1),
        ({"method": "diloco"}, 2),
    ],
)
def test_what_a_method_stores_beside_the_parameters(options, copies):
    found = memory(SMALL.replace(**options))
    assert found[:3] == (PARAMETERS, 0, PARAMETERS)
    assert 0 <= found.exchange - copies * PARAMETERS < 200


def test_chips_of_a_worker_share_its_state():
    whole, of_chip = memory(SMALL.replace(delay=1)), memory(SMALL.replace(delay=1, chips_per_worker=2))
    for one, half in zip(whole, of_chip, strict=True):
        assert one / 2 <= half < 0.51 * one + 200  # Biases are whole on each.


def test_the_table_has_a_row_per_method_and_option():
    lines = table(SMALL.replace(chips_per_worker=2)).splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {"lsgd", "lsgd --delay 1", "lsgd --wire int8", "local_sgd --delay 1", "diloco", "independent"} <= set(names)
    assert "easgd --delay 1" not in names
    assert len({len(line) for line in lines}) == 1
