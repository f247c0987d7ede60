"""lsgd simulate, run as a user runs it, and its mistakes."""

import json
import re

import pytest

from lsgd_jax import cli
from lsgd_jax.figures import output
from lsgd_jax.figures.simulation import for_terminal
from lsgd_jax.presets import PRESETS

SMALL = ["simulate", "digits", "--groups", "1", "--workers", "3", "--steps", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lsgd,adam"], "there is no method 'adam'; there are lsgd, lsgd-joined, "),
        (["--slow", "3", "2"], "there is no worker 3: workers are numbered from 0 to 2."),
        (["--trace", "none.csv"], "the trace none.csv can't be read"),
        (["--target", "5"], "target must be in [0, 1], got 5.0."),
        (["--parameters", "5"], "parameters must be at least 1, with --costs-only, got 5."),
        (["--method", "easgd"], "simulate chooses the method itself"),
        (["--asynchronous", "posted"], "use --methods lsgd-joined or lsgd-posted in place of --asynchronous."),
        (["--revive", "from_leader"], "revive has no effect in simulate."),
        (
            ["--costs-only", "--step-seconds", "1e10"],
            "virtual time, where a simulation ends: lower steps or step_seconds.",
        ),
        (
            ["--costs-only", "--variation", "pareto", "--tail", ".1"],
            "1e+09 seconds of virtual time, where a simulation ends: lower steps or step_seconds, or raise tail.",
        ),
        (["--costs-only", "--variation", "lognormal", "--sigma", "99"], "lower steps, step_seconds or sigma."),
        (
            [
                "--costs-only",
                "--methods",
                "easgd",
                "--groups",
                "2",
                "--workers",
                "64",
                "--variation",
                "pareto",
                "--tail",
                ".1",
            ],
            "lower steps or step_seconds, or raise tail.",
        ),
        (["--costs-only", "--local-bandwidth", "1e-300"], "raise local_bandwidth or lower local_latency."),
        (
            ["--costs-only", "--groups", "2", "--global-bandwidth", "1e-300"],
            "raise local_bandwidth or global_bandwidth or lower",
        ),
        (
            ["--costs-only", "--methods", "easgd", "--local-latency", "1e300"],
            "once takes 1e+300 seconds, but must take",
        ),
        (["--workers", "65"], "training is for at most 64 workers, got 65: simulate costs only."),
        (["--workers", "65", "--steps", "6", "--costs-only"], "the steps must be a multiple of 4"),
        (["--wire", "int8", "--methods", "lsgd"], "without wire"),
    ],
)
def test_a_mistake_exits_with_2_and_one_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("lsgd: ")
    assert error.count("\n") == 1


def test_a_number_out_of_range(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([*SMALL, "--step-seconds", "-1"]) == 2
    assert capsys.readouterr().err == "lsgd: step_seconds must be positive, got -1.0.\n"
    assert cli.main([*SMALL, "--pause-every", "1" + 20 * "0"]) == 2
    assert "lsgd: pause_every must be at least 1 and below 2^63, got 1" in capsys.readouterr().err


def test_costs_only(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = [*SMALL, "--costs-only", "--slow", "0", "10", "--absences", "1", "0.2", "0.5", "--out", str(out)]
    cli.main(command)
    assert "| lsgd-joined " in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{kind}" for name in ("staleness", "timeline") for kind in ("csv", "json", "pdf", "png", "svg")
    ]
    methods = json.loads((out / "timeline.json").read_text())["methods"]
    assert methods["lsgd-posted"]["efficiency"] > methods["lsgd"]["efficiency"]
    first = (out / "timeline.csv").read_bytes()
    monkeypatch.setattr(output, "write_formats", lambda *_, **__: None)  # Pictures take longest.
    cli.main(command)
    assert (out / "timeline.csv").read_bytes() == first


@pytest.mark.usefixtures("png_only")
def test_many_workers(tmp_path, capsys):
    out = tmp_path / "out"
    many = ["--workers", "1000", "--costs-only", "--parameters", "1000000", "--variation", "pareto"]
    cli.main([*SMALL, *many, "--out", str(out)])
    assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".json", ".png"]


def test_a_terminal_shows_the_columns_that_fit():
    summary = {"virtual_seconds": 12.0, "waiting": 0.25, "bytes_sent_per_worker": 2.5e6, "mean_staleness": None}
    methods = {"lsgd": summary | {"final_error": 0.018, "seconds_to_0.05": None}}
    headline = PRESETS["digits"].task.headline
    titles = ["method", "final\nerror", "seconds\nto 5.0%", "virtual\nseconds", "waiting", "MB\nsent"]
    wide = for_terminal(methods, headline, 120)
    assert [column.header for column in wide.columns] == [*titles, "staleness\n(steps)"]
    assert [next(column.cells) for column in wide.columns] == ["lsgd", "1.80%", "never", "12", "25.0%", "2.5", "-"]
    assert [column.header for column in for_terminal(methods, headline, 34).columns] == titles[:4]


@pytest.mark.usefixtures("png_only")
def test_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.Output, "isatty", lambda _: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = tmp_path / "out"
    cli.main([*SMALL, "--methods", "lsgd,lsgd-posted", "--eval-every", "4", "--out", str(out)])
    methods = json.loads((out / "error.json").read_text())["methods"]
    assert methods.keys() == {"lsgd", "lsgd-posted"}
    assert 0 <= methods["lsgd"]["final_error"] <= 1
    printed, shown = capsys.readouterr()
    assert "final" in printed
    assert "|" not in printed
    assert "training with lsgd " in shown
    assert re.search(r"training with lsgd-posted .*100%", shown)
    assert (out / "error.csv").read_text().startswith("method,seconds,steps,center_error\nlsgd,")
