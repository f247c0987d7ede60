import dataclasses
import json
import os
from typing import get_type_hints

import pytest

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Classification
from lsgd_jax.tracking.run_folder import RunFolder

BASE = PRESETS["mnist1d"]  # 2 groups of 4.


def fields_of(config):
    """All fields, as JSON has them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return values | {"task": config.task.to_dict()}


def old_fields_of(config):
    """All fields as an earlier version wrote them, when there was classification alone."""
    return {name: value for name, value in config.flat.items() if name != "task"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name, tmp_path):
    (tmp_path / "config.json").write_text(PRESETS[name].to_json())
    assert Config.load(tmp_path) == PRESETS[name]


def test_unknown_fields_are_named():
    text = json.dumps(fields_of(PRESETS["digits"]) | {"perid": 4})
    with pytest.raises(ValueError, match="unknown configuration fields: perid"):
        Config.from_json(text)


def changed(config, **changes):
    """A copy with fields changed, also those of the task, and nothing dropped."""
    own = {name: changes.pop(name) for name in config.task.fields.keys() & changes.keys()}
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **own), **changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("period", 0, "period must be at least 1, got 0"),
        ("global_period", 6, "global_period must be a multiple of period, 4, got 6"),
        ("pull", 1.01, r"pull must be in \[0, 1\], got 1\.01"),
        ("global_pull", float("nan"), r"global_pull must be in \[0, 1\], got nan"),
        ("learning_rate", 0.0, r"learning_rate must be positive, got 0\.0"),
        ("learning_rate_drops", (0.5, 1.0), r"learning_rate_drops must be fractions in \(0, 1\), got \(0\.5, 1\.0\)"),
        ("learning_rate_drops", (0.5, 0.5), "learning_rate_drops must be different from each other"),
        ("method", "sgd", r"method must be one of lsgd, easgd, downpour, .*, got 'sgd'; did you mean lsgd\?"),
        ("validation", 0.6, r"validation must be in \[0, 0\.5\], got 0\.6"),
        ("stale_pull", -1.0, r"stale_pull must be in \[0, 1\], got -1\.0"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\), got 1\.0"),
        ("weight_decay", -1.0, r"weight_decay must be at least 0, got -1\.0"),
        ("clip_norm", 0.0, r"clip_norm must be positive, got 0\.0"),
        ("learning_rate_warmup", 1.0, r"learning_rate_warmup must be in \[0, 1\), got 1\.0"),
        ("window", 10**7, "window must be at most 1,000,000, got 10000000"),
        ("seed", -1, "seed must be in"),
        ("broadcast", "tree", "broadcast must be auto, all_reduce, ring, chain, hierarchical or not given, got 'tree'"),
        ("wire", "int4", "wire must be bfloat16, int8 or not given, got 'int4'"),
        ("delay", 2, "delay must be 0, 1 or not given, got 2"),
        ("delay", True, "delay must be 0, 1 or not given, got True"),
        (
            "local_optimizer",
            "adam",
            r"local_optimizer must be sgd, adamw, lars or muon, got 'adam'; did you mean adamw\?",
        ),
        ("batch", "Per_worker", "batch must be per_worker or global, got 'Per_worker'"),
        ("learning_rates", "Equal", "learning_rates must be equal, linear, powers or ladder, got 'Equal'"),
        ("sampling", "Shards", "sampling must be shards, independent or partitions, got 'Shards'"),
        ("batch_statistics", "typo", "batch_statistics must be own, mean, leader or reestimate, got 'typo'"),
        ("model", "my_net", "model must be conv1d, mlp, cnn7, vgg16, resnet20 or resnet50, got 'my_net'"),
        ("steps", 100.0, r"steps must be a whole number, got 100\.0"),
        ("steps", True, "steps must be a whole number, got True"),
        ("learning_rate", "0.1", r"learning_rate must be a number, got '0\.1'"),
        ("pull", "strong", "pull must be a number or not given, got 'strong'"),
        ("learning_rate_drops", [0.5], r"learning_rate_drops must be a tuple, each entry of it a number, got \[0\.5\]"),
        ("global_period", 99999999996, r"global_period must be below 2\^31, got 99999999996"),
        ("checkpoint_every", 2**31, r"checkpoint_every must be below 2\^31"),
        ("tune_learning_rates", (float("nan"),), "tune_learning_rates must be positive"),
    ],
)
def test_a_field_out_of_range_is_one_sentence(field, value, message):
    with pytest.raises(ValueError, match=message):
        changed(BASE, **{field: value})


@pytest.mark.parametrize("text", ["[]", "{}", '{"dataset": "digits"}', "no JSON"])
def test_what_is_no_configuration_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - one of three, JSON's own among them.
        Config.from_json(text)


@pytest.mark.parametrize("name", ["sampling", "model", "method", "groups", "global_period", "tune_periods"])
def test_an_object_in_place_of_a_value_is_one_sentence(name):
    text = json.dumps(old_fields_of(BASE) | {name: {}})
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {{}}\.$"):
        Config.from_json(text)


def test_warmup_and_decay_have_to_fit():
    dataclasses.replace(BASE, learning_rate_warmup=0.25, learning_rate_decay=0.75)
    with pytest.raises(ValueError, match=r"^learning_rate_decay must be at most 0\.75, after the warmup, got 0\.8"):
        dataclasses.replace(BASE, learning_rate_warmup=0.25, learning_rate_decay=0.8)


def test_a_global_batch_is_divided_among_the_workers():
    config = dataclasses.replace(PRESETS["mnist1d"], batch="global", batch_size=32)
    assert config.worker_batch_size == 4
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 8 workers, if it is global, got 30"):
        dataclasses.replace(config, batch_size=30)


def test_options_of_other_methods_have_their_ranges():
    with pytest.raises(ValueError, match=r"outer_learning_rate must be positive, got 0\.0"):
        dataclasses.replace(BASE, method="diloco", outer_learning_rate=0.0)


def test_easgd_is_told_what_its_pull_may_be_at_most():
    with pytest.raises(ValueError, match=r"^workers \* pull must be at most 1, got 8 \* 0\.2: give center_pull"):
        dataclasses.replace(PRESETS["mnist1d"], method="easgd", pull=0.2)
    dataclasses.replace(PRESETS["mnist1d"], method="easgd", pull=0.2, center_pull=0.9)


def test_data_parallel_workers_stay_together():
    with pytest.raises(ValueError, match="learning_rates must be equal for data_parallel"):
        dataclasses.replace(PRESETS["mnist1d"], method="data_parallel", learning_rates="linear")


@pytest.mark.parametrize("run", [{"method": "local_sgd"}, {"method": "independent"}, {"asynchronous": "joined"}])
def test_a_ladder_needs_leaders_in_step(run):
    with pytest.raises(ValueError, match=r"^learning_rates must be equal, linear or powers unless "):
        PRESETS["mnist1d"].replace(**run, learning_rates="ladder")


FIELDS = [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_a_value_of_another_type(name):
    for value in (object(), b"", [1], True):
        with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as error:
            dataclasses.replace(BASE, **{name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", [name for name, of in get_type_hints(Config).items() if "float" in str(of)])
def test_no_number_is_nan(name):
    value = (float("nan"),) if name in ("learning_rate_drops", "slowdowns", "tune_learning_rates") else float("nan")
    method = next((method for method, row in METHODS.items() if name in row.options), "lsgd")
    needed = {"local_optimizer": "adamw"} if name in ("adam_b1", "adam_b2") else {}
    needed |= {"evaluated_model": "tail_mean"} if name == "tail_share" else {}
    stretched = {"asynchronous": "joined", "min_step_seconds": 0.1} if name in ("min_step_seconds", "slowdowns") else {}
    with pytest.raises(ValueError, match=f"^{name} must be "):
        dataclasses.replace(BASE, **{"method": method} | needed | stretched | {name: value})


ROBUST = ("coordinate_median", "trimmed_mean")
HAVE = {
    "period": ("lsgd", "easgd", "downpour", "local_sgd", "diloco", "quorum", "mgrawa", "lgrawa", *ROBUST),
    "pull": ("lsgd", "easgd", "quorum", "mgrawa", "lgrawa", *ROBUST),
    "window": ("lsgd", "quorum", "independent"),
    "pull_at": ("lsgd", "easgd", "quorum"),
    "center_pull": ("easgd",),
    "outer_learning_rate": ("diloco", "quorum"),
    "outer_momentum": ("diloco", "quorum"),
    "kappa": ("quorum",),
    "prox": ("mgrawa", "lgrawa"),
    "trim": ("trimmed_mean",),
    "global_pull": ("lsgd", "quorum"),
    "global_period": ("lsgd", "quorum"),
    "stale_pull": ("lsgd",),
    "global_stale_pull": ("lsgd",),
    "broadcast": ("lsgd",),
    "wire": ("lsgd", "local_sgd", "quorum"),
    "delay": ("lsgd", "local_sgd", "quorum"),
    "revive": ("lsgd", "quorum"),
    "fragments": ("lsgd", "easgd", "downpour", "local_sgd", "diloco", "quorum", "mgrawa", "lgrawa", *ROBUST),
    "overlap": ("lsgd", "easgd", "downpour", "local_sgd", "diloco", "quorum", "mgrawa", "lgrawa", *ROBUST),
    "mixing": ("local_sgd", "diloco"),
    "election": ("lsgd", "quorum"),
}
"""The methods that have an option."""
GIVEN = dict.fromkeys(HAVE, 0.1) | {"period": 2, "window": 5, "global_period": 8, "broadcast": "ring"}
GIVEN |= {"wire": "bfloat16", "delay": 1, "revive": "from_leader", "pull_at": "before_step"}
GIVEN |= {"fragments": 2, "overlap": 1, "election": "per_fragment"}
NEEDS = {"overlap": {"period": 3}, "election": {"fragments": 2}}
"""Further options without which one has no effect or is out of range."""
WITHOUT_VALUE = {"wire", "fragments", "overlap", "mixing", "election"}
"""Options that have no value or no effect by default."""


@pytest.mark.parametrize("name", HAVE)
def test_an_option_of_other_methods_is_refused_and_they_are_named(name):
    for method in METHODS:
        if method in HAVE[name]:
            config = dataclasses.replace(BASE, method=method, **{name: GIVEN[name]} | NEEDS.get(name, {}))
            assert config.method_options[name] == GIVEN[name]
        else:
            with pytest.raises(ValueError, match=f"^{name} has no effect with {method}: ") as error:
                dataclasses.replace(BASE, method=method, **{name: GIVEN[name]})
            assert str(error.value).endswith(f": it is an option of {', '.join(HAVE[name])}.")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"groups": 1, "global_pull": 0.1}, "with one group"),
        ({"groups": 1, "global_period": 6}, "with one group"),
        ({"groups": 1, "global_stale_pull": 0.1}, "with one group"),
        ({"local_optimizer": "adamw", "momentum": 0.5}, "with the local_optimizer adamw"),
        ({"adam_b1": 0.8}, "unless the local_optimizer is adamw or muon"),
        ({"local_optimizer": "lars", "adam_b2": 0.9}, "unless the local_optimizer is adamw or muon"),
        (
            {"learning_rate_schedule": "cosine", "learning_rate_decay": 0.2},
            "unless the learning_rate_schedule is constant",
        ),
        ({"batch_statistics": "mean"}, "with a model without batch normalization"),
        ({"statistics_batches": 8}, "with a model without batch normalization"),
        (
            {"model": "resnet20", "batch_statistics": "own", "statistics_batches": 8},
            "unless batch_statistics is reestimate",
        ),
        ({"image_size": 128}, "unless the dataset is imagenet2012"),
        ({"data_processes": 8}, "unless examples are streamed, as ImageNet's are"),
        ({"learning_rate_drops": (), "learning_rate_drops_in": "epochs"}, "without learning_rate_drops"),
        ({"checkpoint_every": 0, "keep_checkpoints": 3}, "if checkpoint_every is 0"),
        ({"asynchronous": "joined", "checkpoint_every": 10}, "with joined, which keeps no checkpoints"),
        ({"asynchronous": "joined", "keep_checkpoints": 3}, "in asynchronous training"),
        ({"asynchronous": "posted", "keep_checkpoints": 3}, "in asynchronous training"),
        *(
            ({"asynchronous": way, name: value}, f"with {way}, where the options of lsgd are period, {options}")
            for way, name, value, options in [
                ("posted", "broadcast", "ring", "pull, global_pull, global_period, window"),
                ("posted", "wire", "int8", "pull, global_pull, global_period, window"),
                ("posted", "delay", 1, "pull, global_pull, global_period, window"),
                ("posted", "stale_pull", 0.1, "pull, global_pull, global_period, window"),
                ("joined", "stale_pull", 0.1, "pull, global_pull, global_period, window, broadcast, wire, delay"),
                ("joined", "revive", "from_leader", "pull, .*"),
                ("joined", "pull_at", "before_step", "pull, .*"),
            ]
        ),
        ({"election": "per_fragment"}, "unless there are several fragments"),
        ({"fragments": 1, "election": "per_fragment"}, "unless there are several fragments"),
        ({"staleness": 1}, "unless workers elect leaders among what is posted"),
        ({"asynchronous": "joined", "staleness": 1}, "unless workers elect leaders among what is posted"),
        (
            {"method": "easgd", "asynchronous": "posted", "staleness": 1},
            "unless workers elect leaders among what is posted",
        ),
        (
            {"method": "easgd", "asynchronous": "posted", "pull_at": "before_step"},
            "with posted, where the options of easgd are period, pull, center_pull",
        ),
        ({"min_step_seconds": 0.1}, "unless training is asynchronous"),
        ({"asynchronous": "joined", "slowdowns": (2.0,)}, "without min_step_seconds"),
        ({"tune_periods": (4,)}, "without tune_learning_rates"),
    ],
)
def test_what_has_no_effect_is_refused_and_the_reason_told(fields, reason):
    *others, name = fields
    with pytest.raises(ValueError, match=f"^{name} has no effect {reason}[.]$"):
        changed(BASE, **fields)
    others = changed(BASE, **{other: fields[other] for other in others})
    assert not others.has_effect(name)


def test_a_change_drops_what_it_leaves_without_effect():
    grouped = dataclasses.replace(BASE, pull=0.3, global_period=8, wire="int8")
    assert grouped.replace(method="easgd", pull=0.1) == dataclasses.replace(BASE, method="easgd", pull=0.1)
    assert grouped.replace(groups=1) == dataclasses.replace(BASE, groups=1, pull=0.3, wire="int8")
    with pytest.raises(ValueError, match="pull has no effect with local_sgd"):
        grouped.replace(method="local_sgd", pull=0.3)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_one_for_every_method_and_for_one_group(name, method):
    assert PRESETS[name].replace(method=method).replace(groups=1).method == method


def test_an_option_is_for_all_methods_that_have_it():
    configs = BASE.for_methods({name: name for name in METHODS}, {"pull": 0.1, "prox": 0.2, "steps": 8})
    assert {name for name, config in configs.items() if config.pull == 0.1} == set(HAVE["pull"])
    assert {name for name, config in configs.items() if config.prox == 0.2} == set(HAVE["prox"])
    assert {config.steps for config in configs.values()} == {8}
    with pytest.raises(ValueError, match=r"^prox has no effect with lsgd: it is an option of mgrawa, lgrawa[.]$"):
        BASE.for_methods({"lsgd": "lsgd", "easgd": "easgd"}, {"prox": 0.2})
    with pytest.raises(ValueError, match=r"^easgd: workers \* pull must be at most 1, got"):
        BASE.for_methods({"lsgd": "lsgd", "easgd": "easgd"}, {"pull": 0.2})


def test_the_table_above_has_every_option():
    assert set(HAVE) == {name for row in METHODS.values() for name in row.options}
    assert set(HAVE) - {"period"} == {name for name, default in vars(Config).items() if name in HAVE and not default}


STALE = {"method": "local_sgd", "groups": 1, "pull": 0.3, "global_period": 6, "image_size": 32, "window": 7}
"""What was written before options without effect were refused."""


def test_an_old_run_is_read_without_the_options_that_had_no_effect(tmp_path):
    fields = old_fields_of(BASE) | STALE
    config = dataclasses.replace(BASE, method="local_sgd", groups=1)
    assert Config.from_json(json.dumps(fields)) == config
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert Config.load(str(tmp_path)) == config
    with RunFolder(tmp_path, config, resume=True):  # It goes on.
        pass


@pytest.mark.parametrize("method", METHODS)
def test_a_file_shows_what_a_run_had_and_gives_what_was_set(method):
    config = BASE.replace(method=method)
    fields = json.loads(config.to_json())
    defaults = fields.pop("defaults")
    options = METHODS[method].options
    assert None not in fields.values()
    own = fields["task"] | {"task": "Classification"}
    assert own.pop("class") == "lsgd_jax.tasks.classification:Classification"
    assert fields | own == json.loads(json.dumps(config.effective))
    assert set(HAVE) & set(fields) == set(options) - WITHOUT_VALUE
    assert set(defaults) == set(HAVE) & set(fields) - {"period"} | {"checkpoint_every"}
    assert Config.from_json(config.to_json()) == config
    own = {name: value for name, value in {"pull": 0.125, "window": 10, "prox": 0.01}.items() if name in options}
    config = dataclasses.replace(config, checkpoint_every=config.eval_every, **own)  # As by default, but set.
    assert Config.from_json(config.to_json()) == config


def test_a_run_keeps_its_values_when_defaults_change():
    """Also those that nobody had set."""
    text = BASE.to_json().replace('"pull": 0.1,', '"pull": 0.3,').replace('"window": 10', '"window": 64')
    config = Config.from_json(text)
    assert (config.pull, config.window, config.global_period) == (0.3, 64, None)
    assert config.effective | {"pull": 0.1, "window": 10, "global_pull": 0.1} == BASE.effective


@pytest.mark.parametrize("defaults", [[1], 5, ["steps"], ["nothing"], [[]], [{}]])
def test_defaults_of_a_file_that_are_none_are_one_sentence(defaults):
    text = json.dumps(json.loads(BASE.to_json()) | {"defaults": defaults})
    with pytest.raises(ValueError, match=r"^(not a configuration: |steps must be a whole number, got None).*\.$"):
        Config.from_json(text)


def test_a_file_of_before_has_other_names_nulls_and_defaults():
    old = old_fields_of(BASE) | {
        "window": 10,
        "broadcast": "auto",
        "revive": "never",
        "delay": 0,
        "least_step_seconds": 0.0,
    }
    del old["min_step_seconds"], old["pull_at"]
    assert Config.from_json(json.dumps(old)) == BASE
    old |= {"asynchronous": "joined", "least_step_seconds": 0.5}
    assert Config.from_json(json.dumps(old)) == dataclasses.replace(BASE, asynchronous="joined", min_step_seconds=0.5)


def test_a_run_goes_on_with_one_group_without_global_options_and_back(tmp_path):
    grouped = dataclasses.replace(BASE, global_period=8)
    alone = grouped.replace(groups=1)
    for config, resume in [(grouped, False), (alone, True), (grouped, True)]:
        with RunFolder(tmp_path / "run", config, resume=resume) as folder:
            folder.resume(0)
    with pytest.raises(UsageError, match="can't be resumed with another global_period: 16, not 8"):
        RunFolder(tmp_path / "run", dataclasses.replace(BASE, global_period=16), resume=True)


def test_a_run_goes_on_with_the_options_that_were_set_whatever_follows_from_the_workers(tmp_path):
    begun = dataclasses.replace(BASE, method="easgd", pull=0.1)
    with RunFolder(tmp_path / "run", begun) as folder:
        folder.resume(0)
    with RunFolder(tmp_path / "run", dataclasses.replace(begun, groups=1), resume=True):  # With half the center_pull.
        pass
    for changed, message in [
        ({"pull": 0.05}, "can't be resumed with another pull: 0.05, not 0.1"),
        ({"center_pull": 0.5}, "can't be resumed with another center_pull: 0.5, not 0.8"),
        ({"pull_at": "before_step"}, "can't be resumed with another pull_at: 'before_step', not 'after_step'"),
        (
            {"pull": 0.01, "workers": 8},
            r"these workers: workers \* pull must be at most 1, got 16 \* 0\.1",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            RunFolder(tmp_path / "run", dataclasses.replace(begun, **changed), resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["center_pull"] == 0.8


def test_a_run_does_not_go_on_with_an_option_that_had_no_value(tmp_path):
    with RunFolder(tmp_path / "run", BASE) as folder:
        folder.resume(0)
    with pytest.raises(UsageError, match="can't be resumed with another wire: 'int8', not None"):
        RunFolder(tmp_path / "run", dataclasses.replace(BASE, wire="int8"), resume=True)
    set_as_by_default = dataclasses.replace(BASE, pull=0.1, window=10, global_period=16)
    with RunFolder(tmp_path / "run", set_as_by_default, resume=True):
        pass


def test_a_pipe_in_place_of_a_configuration_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match=r"config\.json"):
        Config.load(tmp_path)


def test_fields_of_the_task_are_replaced_like_others():
    changed = BASE.replace(width=0.5, steps=8)
    assert changed == dataclasses.replace(BASE, task=Classification("mnist1d", "conv1d", 0.5), steps=8)
    imagenet = PRESETS["resnet50-imagenet-4"].replace(image_size=32, data_processes=0)
    small = imagenet.replace(dataset="cifar10", model="cnn7")  # Which drops what is for ImageNet and batch norm.
    assert (small.task, small.data_processes) == (Classification("cifar10", "cnn7"), 4)
    with pytest.raises(ValueError, match=r"^image_size has no effect unless the dataset is imagenet2012\.$"):
        BASE.replace(image_size=32)
    with pytest.raises(ValueError, match=r"^lsgd: period must be at least 1"):
        BASE.for_methods({"lsgd": "lsgd"}, {"width": 0.5, "period": 0})
    assert BASE.for_methods({"easgd": "easgd"}, {"width": 0.5})["easgd"] == BASE.replace(width=0.5, method="easgd")


def test_an_old_file_has_the_fields_of_classification_among_the_others():
    for config in (BASE, PRESETS["resnet50-imagenet-4"].replace(image_size=64)):
        assert Config.from_json(json.dumps(old_fields_of(config))) == config
