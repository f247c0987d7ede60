"""The command line, run as a user runs it."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import jax
import pytest
import tyro

from lsgd_jax import cli, distributed
from lsgd_jax.cli import commands, costs, faults, launch, overview, preparation
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.cluster import Cluster
from lsgd_jax.tracking.output import Output
from lsgd_jax.tracking.run_folder import read_metrics
from tests.reliability.commands import called, done
from tests.reliability.commands import lsgd as lsgd_process


def started(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lsgd_jax", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mnist2d"], "lsgd: there is no preset 'mnist2d'; did you mean mnist1d?"),
        (["train", "imagenet"], "lsgd: there is no preset 'imagenet'; there are mnist1d, digits, "),
        (["train", "mnist1d", "--perid", "4"], "lsgd: there is no option '--perid'; did you mean --period?"),
        (["train", "mnist1d", "--lr=0.1"], "lsgd: there is no option '--lr'; did you mean --learning-rate?"),
        (["train", "diabetes", "--model", "mlp"], "'--model'; lsgd train diabetes --help lists those that there are."),
        (
            ["info", "--bytes", "digits", "--memory", "digits"],
            "info prints --bytes or --memory: leave out one of them.",
        ),
        (["info", "--memory", "digits", "--chips-per-worker", "0"], "chips_per_worker must be at least 1, got 0."),
        (["figure", "F4", "--rns", "x"], "lsgd: there is no option '--rns'; did you mean --runs?"),
        (["train", "mnist1d", "--period", "0"], "period must be at least 1, got 0."),
        (["train", "mnist1d", "--period", "four"], "lsgd: --period must be a whole number, got 'four'."),
        (["train", "mnist1d", "--steps"], "lsgd: --steps needs a value."),
        (["train"], "lsgd: train needs a preset, as in lsgd train mnist1d; there are mnist1d, "),
        (["train", "--period", "3", "digits"], "lsgd: the preset comes first, as in lsgd train digits, and options"),
        (["train", "mnist1d", "--learning-rate", "x"], "lsgd: --learning-rate must be a number, got 'x'."),
        (["compare", "mnist1d", "--methods", "lsgd", "easgd"], "lsgd: easgd is no argument here; values in a list are"),
        (["join"], "lsgd: join needs PATH, the run folder; lsgd join --help says more."),
        (["launch", "--processes", "2", "--", "train", "digits", "--wire", "int4"], "got 'int4'; did you mean int8?"),
        (
            ["launch", "--processes", "2", "--", "train", "digts", "--run-dir", "a:b"],
            "no preset 'digts'; did you mean digits?",
        ),
        (
            ["launch", "--processes", "2", "--", "train", "--workers", "2", "./no.py:p"],
            "lsgd: the preset comes first, as in lsgd train ./no",
        ),
        (["train", "mnist1d", "--global-period", "6"], "global_period must be a multiple of period, 4, got 6."),
        (["train", "mnist1d", "--pull", "1.5"], "pull must be in [0, 1], got 1.5."),
        (["train", "mnist1d", "--model", "cnn"], "got 'cnn'; did you mean cnn7?"),
        (["train", "mnist1d", "--batch-size", "5000"], "lower one of them"),
        (["train", "digits", "--model", "conv1d"], "use mlp"),
        (["train", "digits", "--method", "sgd"], "method must be one of lsgd, easgd, "),
        (["compare", "digits", "--methods", "lsgd,adam"], "there is no method 'adam'; there are lsgd, easgd, "),
        (["compare", "digits", "--method", "easgd"], "compare chooses the method itself"),
        (["compare", "digits", "--validation", "0.2"], "compare chooses the validation itself"),
        (["train", "digits", "--validation", "0.0001"], "validation holds out none or all"),
        (["compare", "digits", "--seeds", "3..1"], "like 0,1,2 or 0..4, got '3..1'"),
        (["compare", "digits", "--target", "5"], "target must be in [0, 1], got 5.0."),
        (["figure", "F99"], "name must be one of F4, F5, "),
        (["info", "--bytes", "mnist2d"], "there is no preset 'mnist2d'; did you mean mnist1d?"),
        (["compile", "digits", "--topology", "v5e:2x4", "--hlo", "no/file"], "no/file can't be written (No such file"),
        (["train", "digits", "--wire", "int4"], "--wire must be one of bfloat16, int8, got 'int4'; did"),
        (["train", "digits", "--method", "lsdg"], "trimmed_mean, independent, got 'lsdg'; did you mean lsgd?"),
        (["compare", "digits", "--methods", "lsgd,easdg"], "lsgd: there is no method 'easdg'; did you mean easgd?"),
        (["simulate", "digits", "--methods", "LSGD-Posted"], "no method 'LSGD-Posted'; did you mean lsgd-posted?"),
        (["info", "--bytes", "digts"], "lsgd: there is no preset 'digts'; did you mean digits?"),
        (["info", "--memory", "Digits"], "lsgd: there is no preset 'Digits'; did you mean digits?"),
        (["figure", "F44"], "got 'F44'; did you mean F4?"),
        (["figure", "F4", "--model", "cn7"], "--model must be one of cnn7, conv1d, "),
        (["figure", "F4", "--dataset", "cifar1"], "got 'cifar1'; did you mean cifar10?"),
        (["data", "prepare", "cifar1"], "got 'cifar1'; did you mean cifar10?"),
        (["trian"], "lsgd: there is no command 'trian'; did you mean train?"),
        (["--verbose"], "lsgd: there is no command '--verbose'; there are train, compare, "),
    ],
)
def test_a_wrong_argument_exits_with_2_and_says_what_would_be_right(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_too_a_wrong_argument_is_one_plain_sentence(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(cli.Output, "isatty", lambda _: True, raising=False)
    assert cli.main(["train", "mnist1d", "--period", "four"]) == 2
    assert capsys.readouterr().err == "lsgd: --period must be a whole number, got 'four'.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["trian"], "did you mean train?"), (["train", "mnist1d", "--period", "0"], "period must be at least 1")],
)
def test_a_process_exits_with_2_and_no_traceback(arguments, message, tmp_path):
    code, errors = done(*arguments, cwd=tmp_path)
    assert code == 2
    assert any(message in line for line in errors)
    assert not any("Traceback" in line for line in errors)


def test_a_sentence_breaks_between_words_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(cli.Output, "isatty", lambda _: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["train", "digits", "--method", "adam"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 60
    methods = ", ".join(METHODS)
    assert " ".join(lines) == f"lsgd: method must be one of {methods}, got 'adam'."


def test_an_overview_a_version_and_what_is_misspelled_are_answered_without_jax(tmp_path):
    script = "import sys; from lsgd_jax.__main__ import main; code = main(); sys.exit('jax' in sys.modules or code)"
    for arguments, code, text in (
        ([], 0, "usage: lsgd"),
        (["--help"], 0, "usage: lsgd"),
        (["--version"], 0, "lsgd 0."),
        (["train", "digts"], 2, "lsgd: there is no preset 'digts'; did you mean digits?\n"),
        (["train", "mnist1d", "--lr", "0.1"], 2, "lsgd: there is no option '--lr'; did you mean --learning-rate?\n"),
        (["compare"], 2, "lsgd: compare needs a preset, as in lsgd compare mnist1d; there are "),
    ):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
        assert done.returncode == code
        assert (done.stdout + done.stderr).startswith(text)


def test_presets_and_options_are_known_without_jax():
    assert [(name, type(config.task).__name__) for name, config in PRESETS.items()] == [*overview.PRESETS.items()]
    of_methods = {option for method in METHODS.values() for option in method.options}
    assert fields(Config) - of_methods - {"task"} <= names(overview.OPTIONS_OF_PRESETS) <= fields(Config) - {"task"}
    kinds = {type(config.task) for config in PRESETS.values()}
    assert {kind.__name__: fields(kind) for kind in kinds} == {
        kind: names(options) for kind, options in overview.OPTIONS_OF_TASKS.items()
    }
    assert list(overview.OPTIONS_OF_COMMANDS) == list(overview.COMMANDS)
    for command, options in overview.OPTIONS_OF_COMMANDS.items():
        hints = get_type_hints(function_of(command), include_extras=True)
        given = {name for name, kind in hints.items() if tyro.conf.Positional not in get_args(kind)[1:]}
        of_cluster = fields(Cluster) if "cluster" in hints else set()
        assert given - {"options", "cluster", "return"} | of_cluster == names(options)


def fields(kind):
    return {field.name for field in dataclasses.fields(kind)}


def names(options):
    return set(options.replace("-", "_").split())


def function_of(command):
    functions = {"compile": costs.compile_ahead, "info": costs.info, "data": preparation.data}
    functions |= {"launch": launch.launch, "join": launch.join, "chaos": faults.chaos, "replay": faults.replay}
    return functions.get(command) or getattr(commands, command)


def test_the_overview_has_every_command_and_its_summary(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name, summary in overview.COMMANDS.items():
        assert " ".join(function_of(name).__doc__.split("\n\n")[0].split()) == summary
        assert f"  {name} " in text


def test_a_variable_that_jax_can_not_read_is_one_sentence(tmp_path):
    done = started("train", "digits", cwd=tmp_path, JAX_NUM_CPU_DEVICES="abc")
    assert done.returncode == 2
    assert done.stderr == (
        'lsgd: JAX can\'t read a variable of the environment (Invalid value "abc" for JAX flag jax_num_cpu_devices):'
        " change or unset it.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "mnist1d", "--method", "local_sgd", "--pull", "0.3"],
            "pull has no effect with local_sgd: it is an option of lsgd, easgd, quorum, mgrawa, lgrawa,"
            " coordinate_median, trimmed_mean.",
        ),
        (["train", "mnist1d", "--groups", "1", "--global-period", "6"], "global_period has no effect with one group."),
        (["train", "digits", "--local-optimizer", "adamw", "--momentum", "0.5"], "momentum has no effect with the"),
        (["train", "digits", "--learning-rate-drops-in", "epochs"], "learning_rate_drops_in has no effect without "),
        (["train", "digits", "--tune-learning-rates", "0.1"], "tune_learning_rates has no effect in train: it is for"),
        (["train", "digits", "--global-period", "99999999996"], "global_period must be below 2^31, got 99999999996."),
        (["train", "digits", "--run-dir", "a\0b"], "run_dir must be without NUL characters, got 'a\\x00b'."),
        (
            ["train", "digits", "--data-dir", "nowhere"],
            "data_dir has no effect with digits, which comes with",
        ),
        (["train", "digits", "--fragments", "8"], "fragments must be at most the period, 4, got 8: one is sent at a"),
        (["train", "digits", "--fragments", "2", "--overlap", "2"], "overlap must be less than period / fragments, 4"),
        (["train", "digits", "--method", "data_parallel", "--fragments", "2"], "fragments has no effect with data_par"),
        (
            ["train", "digits", "--method", "diloco", "--period", "8", "--fragments", "8"],
            "fragments must be at most 6, the number of arrays that are exchanged, got 8",
        ),
        (["compare", "digits", "--tune-learning-rates", "0.1"], "tune_learning_rates has no effect without --tune."),
        (["compare", "digits", "--checkpoint-every", "5"], "checkpoint_every has no effect in compare, which keeps no"),
        (["compare", "digits", "--methods", "lsgd, easgd", "--prox", "0.1"], "prox has no effect with lsgd: it is an "),
        (["compare", "digits", "--methods", "lsgd,lsgd"], "each method can be named once, got lsgd, lsgd."),
        (["compare", "digits", "--seeds", "0..4294967295"], "seeds must be at most 10,000, got '0..4294967295'."),
        (["compare", "digits", "--out", "a\0b"], "out must be without NUL characters"),
        (
            ["compare", "digits", "--methods", "lsgd", "--tune", "--pull", "0.7"],
            "tuning chooses the pull of lsgd",
        ),
        (
            ["compare", "cnn7-mnist5k-4", "--methods", "easgd", "--tune", "--learning-rate", "1"],
            "tuning chooses the learning_rate of easgd itself",
        ),
        (["simulate", "digits", "--revive", "from_leader"], "revive has no effect in simulate."),
        (["simulate", "digits", "--keep-checkpoints", "5"], "keep_checkpoints has no effect in simulate."),
        (["simulate", "digits", "--asynchronous", "posted"], "simulate chooses the method itself"),
        (
            ["simulate", "digits", "--costs-only", "--learning-rate", "1"],
            "learning_rate has no effect with --costs-only.",
        ),
        (["simulate", "digits", "--costs-only", "--data-dir", "d"], "data_dir has no effect with --costs-only."),
        (["simulate", "digits", "--methods", "easgd,easgd"], "each method can be named once, got easgd, easgd."),
        (
            ["simulate", "digits", "--methods", "easgd", "--prox", "0.1"],
            "prox has no effect with easgd: it is",
        ),
        (["figure", "trajectories", "--model", "cnn7"], "model has no effect on the figure trajectories"),
        (["figure", "theory", "--dataset", "mnist5k"], "dataset has no effect on the figure theory"),
        (["figure", "analytic", "--runs", "runs"], "runs has no effect on the figure analytic"),
        (
            ["compile", "digits", "--topology", "v5e:2x4", "--keep-checkpoints", "5"],
            "keep_checkpoints has no effect",
        ),
    ],
)
def test_what_is_given_has_an_effect_or_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    assert cli.main(arguments) == 2
    assert f"lsgd: {message}" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_the_preset_alone_has_set_may_be_without_effect(monkeypatch):
    taken = []
    monkeypatch.setattr("lsgd_jax.train.train_and_evaluate", lambda config, *_, **__: taken.append(config) or 0.0)
    monkeypatch.setattr(commands, "report_result", lambda *_: None)
    for name in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    preset = PRESETS["cnn7-mnist5k-16"]
    assert preset.global_period
    assert cli.main(["train", "cnn7-mnist5k-16", "--method", "local_sgd", "--period", "8"]) == 0
    assert taken == [preset.replace(method="local_sgd", period=8)]


def test_more_workers_than_a_host_simulates_devices_for_are_refused(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"at most 512 devices, one for each chip .* got 1000000 chips: lower groups"):
        distributed.simulate_devices(1_000_000)


def on_four_devices(*arguments):
    """The command, where JAX has read the variable of their number, as it does when it is imported."""
    jax.config.update("jax_num_cpu_devices", 4)
    code = lsgd_process(*arguments)
    assert jax.device_count() == 4
    return code


def test_fewer_devices_than_workers(tmp_path):
    train = ["train", "digits", "--width", "0.1", "--steps", "8", "--run-dir", "run"]
    code, errors = called(on_four_devices, *train, cwd=tmp_path, JAX_NUM_CPU_DEVICES="4")
    assert code == 0, errors


def test_a_folder_that_cannot_be_written(lsgd, tmp_path):
    (tmp_path / "file").touch()
    for command in (["figure", "trajectories"], ["compare", "digits"]):
        code, _, errors = lsgd(*command, "--out", "file")
        assert code == 2
        assert "can't be written" in errors


def test_a_run_that_ends_before_anybody_led_is_drawn(lsgd, tmp_path):
    code, _, errors = lsgd("train", "digits", "--steps", "8", "--run-dir", "run", "--tensorboard")
    assert code == 0, errors
    assert (tmp_path / "run" / "curves.png").exists()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_train_and_a_second_time_into_the_same_folder(lsgd, tmp_path):
    train = ["train", "digits", "--workers", "2", "--width", "0.1", "--steps", "20", "--run-dir", "run"]
    done = started(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test error of the evaluated model after 20 steps: ")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
    ]
    assert lsgd(*train) == (2, "", "lsgd: the run folder run is not empty: name another run_dir, or resume the run.\n")


def test_a_terminal_is_told_what_is_trained_and_what_came_of_it(lsgd, monkeypatch):
    monkeypatch.setattr(Output, "isatty", lambda _: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, errors = lsgd("train", "digits", "--width", "0.1", "--steps", "32", "--run-dir", "run")
    assert code == 0
    told = "mlp-digits with lsgd: 2 x 4 workers, 32 steps of each; the run is in run\n"
    assert errors.startswith(told)
    assert re.search(r"step 32/32  loss .*test error .*steps/s", errors)
    evaluated = read_metrics("run", "evaluation")[-1]
    sent = f"{evaluated['bytes_sent'] / 1e6:,.2f} MB sent per worker"
    result = rf"test error of the evaluated model after 32 steps: .*%; {sent}"
    assert max(map(len, printed.splitlines())) <= 80
    assert re.match(rf"{result}, global leader changes: [01] in 2 exchanges; see run/", " ".join(printed.split()))


def test_figure(lsgd):
    code, printed, errors = lsgd("figure", "trajectories", "--out", "drawn")
    assert code == 0, errors
    assert "see drawn/trajectories.png" in printed


def test_info_tells_versions_and_devices_and_what_is_sent(lsgd):
    _, printed, _ = lsgd("info")
    assert "devices" in printed
    assert "jax " in printed
    _, printed, _ = lsgd("info", "--bytes", "digits")
    assert printed.startswith("mlp-digits, 2 x 4 workers, 8,970 parameters\n\nmethod ")
    _, _, _, first, *others = printed.splitlines()
    # 8,970 parameters: of 4 workers every 4 steps and of 8 every 16, each with two scalars.
    assert first.split() == ["lsgd", "53,832", "every", "4,", "62,804", "every", "16", "17,383"]
    assert len(others) == len(METHODS) - 1
    _, printed, errors = lsgd("info", "--bytes", "resnet20-cifar10-4")  # Whose data are not there.
    assert printed.splitlines()[3].split()[:4] == ["lsgd", "1,618,344", "every", "4"], errors


def test_info_tells_what_devices_hold(lsgd):
    _, printed, errors = lsgd("info", "--memory", "digits")
    assert printed.splitlines()[1].split() == ["lsgd", "35,880", "0", "35,880", "130", "71,890"], errors
    code, _, errors = lsgd("info", "--chips-per-worker", "2")
    assert (code, errors) == (2, "lsgd: chips_per_worker has no effect without --memory.\n")


def test_a_connection_that_broke_is_one_sentence(monkeypatch, capsys):
    @functools.wraps(costs.info)
    def broken(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:7071")

    monkeypatch.setattr(costs, "info", broken)
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["info"])
    assert capsys.readouterr().err == "lsgd: another process of the run has ended, so that this one can't go on.\n"
