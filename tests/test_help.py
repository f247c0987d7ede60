"""The help of the commands: whole, short, and as wide as the terminal."""

import dataclasses
import re

import pytest

from lsgd_jax import cli
from lsgd_jax.cli import help
from lsgd_jax.config import Config
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS


def helped(capsys, monkeypatch, *arguments, columns=120):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def flags(fields):
    return {"--" + name.replace("_", "-") for name in fields}


@pytest.mark.parametrize("preset", ["mnist1d", "diabetes", "tragedies", "resnet50-imagenet-4"])
def test_the_help_of_a_preset_names_every_option_once(preset, capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "train", preset)
    fields = {field.name for field in dataclasses.fields(Config)} - {"task", "tune_learning_rates", "tune_periods"}
    named = re.findall(r"--[a-z0-9-]+(?=[ ,.\n])", text)
    assert flags(fields | PRESETS[preset].task.fields.keys()) <= set(named)
    shown = re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert "tune" not in text


@pytest.mark.parametrize("given", [("--period", "3"), ("--period=3",)])
def test_the_help_shows_the_values_that_given_options_lead_to(given, capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "train", "mnist1d", *given)
    assert re.search(r"--period 3 ", text)
    assert re.search(r"--global-period 12 ", text)


@pytest.mark.parametrize(
    "given",
    [
        ("--run-dir", "x"),
        ("--steps", "1e3"),
        ("--steps", "-5"),
        ("--width", "a"),
        ("--method", "sgd"),
        ("--slowdowns", "2"),
    ],
)
def test_the_help_passes_over_what_it_can_not_show(given, capsys, monkeypatch):
    assert "--steps 4000 " in helped(capsys, monkeypatch, "train", "mnist1d", *given)


def test_the_tables_have_every_field_once():
    rows = re.findall(r"^\| `(\w+)` \|.*\|$", help.tables(), re.MULTILINE)
    assert sorted(rows) == sorted({field.name for field in dataclasses.fields(Config)} - {"task"})


def test_the_groups_have_all_fields_but_those_of_methods():
    grouped = [name for names in help.GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    of_methods = {name for row in METHODS.values() for name in row.options}
    assert {field.name for field in dataclasses.fields(Config)} - {"task"} <= set(grouped) | of_methods


@pytest.mark.parametrize("method", METHODS)
def test_no_option_takes_more_than_two_lines(method, capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "train", "mnist1d", "--method", method)
    assert len(text.splitlines()) <= 90
    for option in re.findall(r"^  --.*\n(?:   .*\n)*", text, re.MULTILINE):
        alone = re.fullmatch(r"  --\S+ \S+\n((?:.*\n)+)", option)  # Where flag and value have a line of their own.
        assert len((alone[1] if alone and alone[1].strip() else option).splitlines()) <= 2, option


def test_the_help_shows_the_values_that_a_run_has(capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "train", "tragedies", "--method", "diloco")
    for line in ("--outer-momentum 0.9 ", "--clip-norm 1.0 ", "--method diloco ", "--adam-b2 0.98 ", "--context 64 "):
        assert line in text
    assert "--pull " not in text


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "compare",
        "simulate",
        "compile",
        "figure",
        "data",
        "report",
        "launch",
        "join",
        "info",
        "chaos",
        "replay",
    ],
)
def test_the_help_of_a_command_fits_the_terminal(command, capsys, monkeypatch):
    for columns in (80, 120):
        text = helped(capsys, monkeypatch, command, columns=columns)
        assert text.startswith(f"usage: lsgd {command} ")
        assert max(map(len, text.splitlines())) <= columns
    if command in ("train", "compare", "simulate", "compile", "chaos"):
        assert all(f"\n  {name} " in text for name in PRESETS)
        within = helped(capsys, monkeypatch, command, "digits", columns=80)
        assert max(map(len, within.splitlines())) <= 80


def test_choices_are_listed_and_lines_break_between_them(capsys, monkeypatch):
    for columns in (80, 120):
        words = helped(capsys, monkeypatch, "train", "mnist1d", columns=columns).replace(",", " ").split()
        assert {"cifar10", "cifar100", "local_sgd", "coordinate_median"} <= set(words)
        words = helped(capsys, monkeypatch, "data", columns=columns).replace(",", " ").split()
        assert "tiny_shakespeare" in words


def test_units_and_defaults_are_said_in_short(capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "simulate", "digits", "--fragments", "2")
    for line in (
        "--local-bandwidth 1e+10         Bandwidth of each worker's link within its group, in bits per second.",
        "--step-seconds 0.1              Duration of a local step at full speed, in seconds.",
        "--overlap                       Updates between sending and applying, less than period / fragments; by",
        "--methods                       Comma-separated methods; lsgd-joined and lsgd-posted are asynchronous.",
    ):
        assert f"\n  {line}" in text
    assert re.search(r"--pull 0\.0538084 ", helped(capsys, monkeypatch, "train", "mnist1d", "--method", "easgd"))


def test_the_help_of_a_preset_that_can_not_have_a_method_is_that_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = 'from lsgd_jax.presets import PRESETS\npreset = PRESETS["digits"].replace(learning_rates="linear")\n'
    (tmp_path / "unequal.py").write_text(text)
    shown = helped(capsys, monkeypatch, "train", "./unequal.py:preset", "--method", "data_parallel")
    assert "--method lsgd " in shown
    assert "--learning-rates linear " in shown
