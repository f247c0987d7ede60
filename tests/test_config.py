import dataclasses
import json

import pytest

from lsgd_jax.config import Config
from lsgd_jax.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name, tmp_path):
    (tmp_path / "config.json").write_text(PRESETS[name].to_json())
    assert Config.load(tmp_path) == PRESETS[name]


def test_unknown_fields_are_named():
    text = json.dumps(dataclasses.asdict(PRESETS["digits"]) | {"perid": 4})
    with pytest.raises(ValueError, match="unknown configuration fields: perid"):
        Config.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("period", 0, "period must be at least 1, got 0"),
        ("global_period", 6, "global_period must be a multiple of the period, 4, got 6"),
        ("pull", 1.01, r"pull must be in \[0, 1\], got 1\.01"),
        ("global_pull", float("nan"), r"global_pull must be in \[0, 1\], got nan"),
        ("learning_rate", 0.0, r"learning_rate must be positive, got 0\.0"),
        ("learning_rate_drops", (0.5, 1.0), r"learning_rate_drops must be fractions in \(0, 1\), got \(0\.5, 1\.0\)"),
        ("learning_rate_drops", (0.5, 0.5), "learning_rate_drops must be different from each other"),
        ("method", "sgd", "method must be one of lsgd, easgd, downpour, .*, got sgd"),
        ("validation", 0.6, r"validation must be in \[0, 0\.5\], got 0\.6"),
        ("outer_learning_rate", 0.0, r"outer_learning_rate must be positive, got 0\.0"),
        ("stale_pull", -1.0, r"stale_pull must be in \[0, 1\], got -1\.0"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\), got 1\.0"),
        ("weight_decay", -1.0, r"weight_decay must be at least 0, got -1\.0"),
        ("window", 10**7, "window must be at most 1,000,000, got 10000000"),
        ("seed", -1, "seed must be in"),
        ("broadcast", "tree", "a broadcast must be one of auto, all_reduce, ring, chain, hierarchical, got 'tree'"),
        ("wire", "int4", "wire must be bfloat16, int8 or not given, got int4"),
        ("delay", 2, "delay must be 0 or 1, got 2"),
    ],
)
def test_a_field_out_of_range_is_one_sentence(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["mnist1d"], **{field: value})


@pytest.mark.parametrize("text", ["[]", "{}", '{"dataset": "digits"}', "no JSON"])
def test_what_is_no_configuration_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - one of three, JSON's own among them.
        Config.from_json(text)


def test_a_global_batch_is_divided_among_the_workers():
    config = dataclasses.replace(PRESETS["mnist1d"], batch="global", batch_size=32)
    assert config.worker_batch_size == 4
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 8 workers, if it is global, got 30"):
        dataclasses.replace(config, batch_size=30)


def test_easgd_is_told_what_its_pull_may_be_at_most():
    with pytest.raises(
        ValueError, match=r"pull must be at most 1 / workers, 0\.125, if there is no center_pull, got 0\.2"
    ):
        dataclasses.replace(PRESETS["mnist1d"], method="easgd", pull=0.2)
    dataclasses.replace(PRESETS["mnist1d"], method="easgd", pull=0.2, center_pull=0.9)


def test_data_parallel_workers_stay_together():
    with pytest.raises(ValueError, match="learning_rates must be equal for data_parallel"):
        dataclasses.replace(PRESETS["mnist1d"], method="data_parallel", learning_rates="linear")


def test_one_group_has_no_global_period_to_check():
    dataclasses.replace(PRESETS["mnist1d"], groups=1, global_period=6)
