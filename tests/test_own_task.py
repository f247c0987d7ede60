"""A task of one's own, in one file of a few lines, goes through every command; its mistakes are one sentence."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lsgd_jax import cli, distributed
from lsgd_jax.cli.overview import own_preset
from lsgd_jax.config import Config
from lsgd_jax.presets import find
from lsgd_jax.tracking.run_folder import read_metrics
from tests.reliability import commands
from tests.tracking.test_tensorboard import points_in

EXAMPLE = Path(__file__).parents[1] / "examples" / "sine.py"
TINY = ["--width", "8", "--workers", "2", "--batch-size", "8", "--period", "2", "--steps", "8", "--eval-every", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the task in a file; what is imported of it is forgotten in the end."""
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_file_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_it_learns_as_it_is(folder):
    assert cli.main(["train", "./mine.py:preset", "--run-dir", "run", "--checkpoint-every", "0"]) == 0
    assert read_metrics(folder / "run", "evaluation")[-1]["center_loss"] < 0.1  # The variance of sin is 0.5.


@pytest.mark.usefixtures("png_only")
def test_it_goes_through_every_command(folder, capsys):
    run = ["train", "./mine.py:preset", *TINY]
    assert cli.main([*run, "--run-dir", "run", "--tensorboard"]) == 0
    shown = capsys.readouterr()
    evaluations = read_metrics(folder / "run", "evaluation")
    assert [entry["step"] for entry in evaluations] == [4, 8]
    loss = evaluations[-1]["center_loss"]
    assert f"test loss of the evaluated model after 8 steps: {loss:.4f}; " in shown.out
    assert "; see run/curves.png" in shown.out
    assert f"  test loss {loss:.4f}  leader " in shown.err
    assert np.shape(evaluations[-1]["worker_losses"]) == (1, 2)
    assert "center_error" not in evaluations[-1]
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["task"] == {"class": "mine:Sine", "width": 8}
    assert Config.load(folder / "run").task == type(find("mine:preset").task)(8)
    points = points_in(folder / "run" / "tensorboard")
    assert ("test_loss/center", 8, pytest.approx(loss)) in points
    assert {"test_loss/worker_0", "test_loss/worker_1", "test_loss/leader"} <= {tag for tag, _, _ in points}

    assert cli.main([*run, "--run-dir", "run", "--steps", "12", "--resume"]) == 0
    assert [entry["step"] for entry in read_metrics(folder / "run", "evaluation")] == [4, 8, 12]
    errors = [cli.main([*run, "--run-dir", "run", "--width", "9", "--resume"])]
    errors += [cli.main(["train", "digits", "--run-dir", "run", "--resume"])]
    assert errors == [2, 2]
    said = capsys.readouterr().err
    assert "can't be resumed with another width: 9, not 8" in said
    assert "can't be resumed with another task: " in said

    assert cli.main([*run, "--asynchronous", "posted", "--run-dir", "posted"]) == 0
    assert read_metrics(folder / "posted", "evaluation")[-1]["worker_losses"]

    compared = ["compare", "mine:preset", *TINY, "--methods", "lsgd,independent", "--seeds", "0", "--out", "compared"]
    assert cli.main([*compared, "--target", "0.4"]) == 0
    table = (folder / "compared" / "comparison.md").read_text()
    assert "| final loss (95 %) |" in table
    assert "| steps to 0.4 |" in table
    summary = json.loads((folder / "compared" / "comparison.json").read_text())
    assert summary["methods"]["lsgd"]["final_loss"]["mean"] > 0

    assert cli.main(["simulate", "mine:preset", *TINY, "--methods", "lsgd-posted", "--out", "simulated"]) == 0
    assert (folder / "simulated" / "loss.csv").read_text().startswith("method,seconds,steps,center_loss\nlsgd-posted,")
    assert "| final loss |" in capsys.readouterr().out
    assert cli.main(["simulate", "mine:preset", "--costs-only", "--methods", "easgd", "--width", "8"]) == 0

    assert cli.main(["info", "--bytes", "mine:preset"]) == 0
    assert cli.main(["report", "run", "posted"]) == 0
    page = (folder / "report.html").read_text()
    assert "final test loss</dt>" in page
    assert "<figcaption>Test loss</figcaption>" in page
    assert "test error" not in page


def test_it_is_launched_in_several_processes(tmp_path):
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    launched = ["launch", "--processes", "2", "--", "train", "./mine.py:preset", *TINY, "--run-dir", "run"]
    code, errors = commands.done(*launched, cwd=tmp_path)
    assert code == 0, errors
    assert [entry["step"] for entry in read_metrics(tmp_path / "run", "evaluation")] == [4, 8]


@pytest.mark.parametrize(
    ("content", "preset", "message"),
    [
        ("", "./nowhere.py:preset", "there is no file ./nowhere.py: a preset of your own is named as in ./mine.py:"),
        ("", "nowhere.mine:preset", "the preset nowhere.mine:preset can't be imported: ModuleNotFoundError: No module"),
        ("", "./own.py:preset", "preset in ./own.py is not there: write preset = Config(task=...)."),
        (
            "preset = 5",
            "./own.py:preset",
            "preset in ./own.py is not a Config but of type int: write preset = Config(t",
        ),
        (
            "x = 1\n1 / 0",
            "./own.py:preset",
            "the preset ./own.py:preset can't be imported: ZeroDivisionError in line 2 o",
        ),
        ("def", "own:preset", "the preset own:preset can't be imported: SyntaxError: invalid syntax (own.py, line 1)."),
        (
            "from mine import *\npreset = Config(task=Sine(), steps=0, learning_rate=1.0)",
            "./own.py:preset",
            "the preset ./own.py:preset can't be imported: ValueError in line 2 of ",
        ),
        (
            "from mine import *\npreset = preset.replace(width=0.5)",
            "own:preset",
            "the preset own:preset can't be imported: ValueError in line 2 of ",
        ),
        (
            "from mine import *\nclass Own(Sine):\n    width: int = 3\npreset = preset.replace(task=Own())",
            "own:preset",
            "the preset own:preset can't be imported: ValueError in line 4 of ",
        ),
        (
            "from mine import *\n@dataclasses.dataclass(frozen=True)\nclass Own(Sine):\n    resume: int = 3\n"
            "preset = preset.replace(task=Own())",
            "./own.py:preset",
            "the field resume of the task Own has the name of an option of the command: rename it.",
        ),
        (
            "from mine import *\n@dataclasses.dataclass(frozen=True)\nclass Own(Sine):\n"
            "    def measures(self, network, examples):\n        return {'lost': examples[0]}\n"
            "preset = preset.replace(task=Own())",
            "./own.py:preset",
            'Own.measures must return a dictionary with "loss", got lost.',
        ),
        (
            "from mine import *\n@dataclasses.dataclass(frozen=True)\nclass Own(Sine):\n"
            "    def measures(self, network, examples):\n        return {'loss': network(examples[0])}\n"
            "preset = preset.replace(task=Own())",
            "./own.py:preset",
            "Own.measures raises ",
        ),
    ],
)
def test_a_mistake_is_one_sentence(content, preset, message, folder, capsys):
    (folder / "own.py").write_text(content)
    assert cli.main(["train", preset, "--run-dir", "run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lsgd: {message}")
    assert said.count("\n") == 1
    assert not (folder / "run").exists()


def test_a_module_may_look_at_its_preset(folder, capsys):
    """What a preset has worked out for it is no option."""
    (folder / "own.py").write_text("from mine import preset\nlevels = preset.levels")
    assert cli.main(["train", "./own.py:preset", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "lsgd: steps must be at least 1, got 0.\n"


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["train", "./mine.py:preset", "--dataset", "digits"], "./mine.py:preset"),
        (["train", "--dataset", "digits", "mine:preset", "--run-dir", "mnist1d"], "mine:preset"),
        (["compare", "digits", "--out", "./mine.py:preset"], None),
        (["report", "mine:preset"], None),
    ],
)
def test_a_preset_is_found_among_the_arguments(arguments, own):
    assert own_preset(arguments) == own


def test_a_file_of_another_module_s_name_is_one_sentence(folder, capsys):
    shutil.copy(folder / "mine.py", folder / "json.py")
    assert cli.main(["train", "./json.py:preset"]) == 2
    assert capsys.readouterr().err == "lsgd: the module json is another one than ./json.py: rename the file.\n"


def test_options_are_those_of_the_task(folder, capsys):
    assert cli.main(["train", "./mine.py:preset", "--model", "mlp"]) == 2
    assert cli.main(["train", "./mine.py:preset", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--width" in shown
    assert "Units of the hidden layer." in shown
    assert "Local steps of every worker." in shown


def test_a_run_elsewhere_says_where_its_task_is_to_be_found(folder, monkeypatch, capsys, tmp_path_factory):
    config = find("./mine.py:preset").replace(workers=2)
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    (run / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    monkeypatch.delitem(sys.modules, "mine")
    assert cli.main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert (
        "the task 'mine:Sine' can't be imported (ModuleNotFoundError: No module named 'mine'): run the command" in said
    )
