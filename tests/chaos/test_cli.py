"""The command `lsgd chaos`, with nothing launched."""

import functools
import json

import pytest

from lsgd_jax import cli
from lsgd_jax.chaos import Fault, Summary, run
from lsgd_jax.chaos.summary import Span

NOTHING = Span(0, None, None)
SUMMARY = Summary(4, 60.0, 6.0, {"kill": 1}, Span(3, 0.1, 0.2), NOTHING, 0, [], NOTHING, [], 0, 9, 1.0, 0.9, 0.9, 0.05)
EQUAL = "replayed 9 steps and 1 pulls of 4 lives: all distances and 4 checksums of parameters are equal to the bit"


@pytest.fixture
def asked(monkeypatch):
    """What was asked for, in place of being done; the replay's verdict is that in `answers`."""
    asked, answers = [], [run.Outcome(SUMMARY, EQUAL, is_equal=True)]

    def chaos(*arguments, **options):
        asked.append((arguments, options))
        return answers[0]

    monkeypatch.setattr(run, "chaos", chaos)
    return asked, answers


CHAOS = ["chaos", "digits", "--groups", "1", "--workers", "4"]


def test_a_run_is_launched_as_it_is_configured(asked, tmp_path, monkeypatch):
    options = ["--min-step-seconds", "0.02", "--slowdowns", "1", "3", "--width", "0.5", "--learning-rate", "0.05"]
    assert cli.main([*CHAOS, *options, "--minutes", "10", "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    [((command, config, processes, plan, out), given)] = asked[0]
    assert (processes, out, given["seconds"], given["quiet"]) == (4, tmp_path / "out", 600.0, 60.0)
    assert len(plan) > 10
    assert all(60 < fault.at < 600 for fault in plan)
    assert (config.asynchronous, config.steps, config.slowdowns) == ("posted", run.STEPS, (1.0, 3.0))

    launched = []
    instead = functools.wraps(cli.commands.train)(lambda options, **_: launched.append(options.checked()))
    monkeypatch.setattr(cli.commands, "train", instead)
    assert cli.main(list(command)) == 0
    assert launched == [config]


def test_a_plan_is_followed_and_the_summary_written(asked, tmp_path, capsys):
    (tmp_path / "plan").write_text("20 stop 1 2\n5 kill 0\n70 kill 1\n")
    out = tmp_path / "out"
    assert cli.main([*CHAOS, "--minutes", "1", "--plan", str(tmp_path / "plan"), "--out", str(out)]) == 0
    [((_, _, _, plan, _), given)] = asked[0]
    assert (plan, given["quiet"]) == ([Fault(5.0, "kill", (0,)), Fault(20.0, "stop", (1,), 2.0)], 5.0)
    text = (out / "summary.txt").read_text()
    assert text.partition("\n\n")[2] in capsys.readouterr().out
    assert "deaths noticed after                      0.10 s (median of 3), at most 0.20 s\n" in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["noticed"] == {"times": 3, "median": 0.1, "longest": 0.2}
    assert summary["replay"] == EQUAL


@pytest.mark.parametrize(
    "answer",
    [
        run.Outcome(
            SUMMARY, "replayed 9 steps and 1 pulls of 4 lives, which differ from the run's: ...", is_equal=False
        ),
        run.Outcome(SUMMARY._replace(ended=["worker 1 in life 2"]), EQUAL, is_equal=True),
    ],
)
def test_what_should_not_be_is_the_exit_code_1(answer, asked, tmp_path):
    asked[1][0] = answer
    assert cli.main([*CHAOS, "--out", str(tmp_path / "out")]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--asynchronous", "joined"], "chaos supports only posted training, got joined."),
        (["--processes", "3"], "processes must be at least 2 and divide the 4 workers, got 3."),
        (["--minutes", "0"], "minutes must be positive, got 0.0."),
        (["--faults-per-hour", "-1"], "faults_per_hour must be at least 0, got -1.0."),
        (["--out", "."], "the folder . is not empty: name another with --out."),
    ],
)
def test_a_wrong_command_is_one_sentence(options, message, asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*CHAOS, *options]) == 2
    assert capsys.readouterr().err == f"lsgd: {message}\n"
    assert asked[0] == []


def test_a_replay_has_an_exit_code(monkeypatch, tmp_path, capsys):
    from lsgd_jax import distributed
    from lsgd_jax.simulate import replay

    monkeypatch.setattr(distributed, "simulate_devices", lambda count: None)
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "is not a run folder, its environment.json can't be read" in capsys.readouterr().err
    (tmp_path / "environment.json").write_text('{"devices": "2 x cpu (cpu)"}')
    assert replay.device_count(tmp_path) == 2
    for differences, code in [([], 0), (["worker 0, life 1: other parameters after step 5"], 1)]:
        found = replay.Replay(1, 5, 0, 1, differences)
        monkeypatch.setattr(replay, "replay", lambda *_, found=found: found)
        assert cli.main(["replay", str(tmp_path)]) == code
        assert str(found) in capsys.readouterr().out
