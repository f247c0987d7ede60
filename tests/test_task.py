"""A task by itself: its fields, its name in files, and the measure by which runs are compared."""

import dataclasses
import json
import sys
import types
from typing import Any, ClassVar

import pytest

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.task import Data, Headline, Task, check_fields
from lsgd_jax.tasks import Classification, Regression
from lsgd_jax.tracking.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Own(Task):
    headline: ClassVar[Headline] = Headline("miss", "misses", percent=True)

    width: int = 3
    kind: str = "plain"
    sides: tuple[int, ...] = ()
    depth: int = 1

    def no_effect(self, name):
        return "unless kind is deep" if name == "depth" and self.kind != "deep" else None

    def check(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}.")


CONFIG = Config(task=Own(), steps=2, learning_rate=0.1)


def test_a_task_survives_its_file():
    for task in (Own(4, "deep", (1, 2), 3), Regression(8), Classification("digits", "mlp", 0.5)):
        fields = json.loads(json.dumps(task.to_dict()))
        assert Task.from_dict(fields) == task
    assert Own().to_dict() == {"class": f"{__name__}:Own", "width": 3, "kind": "plain", "sides": ()}
    assert Config.from_json(CONFIG.to_json()) == CONFIG


def test_fields_that_have_no_effect_are_refused_or_dropped():
    deep = CONFIG.replace(kind="deep", depth=5)
    assert (deep.task, deep.replace(kind="plain").task) == (Own(kind="deep", depth=5), Own())
    with pytest.raises(ValueError, match=r"^depth has no effect unless kind is deep\.$"):
        CONFIG.replace(depth=2)
    with pytest.raises(ValueError, match=r"^depth has no effect unless kind is deep\.$"):
        dataclasses.replace(CONFIG, task=Own(depth=2))
    assert "depth" not in CONFIG.effective
    assert {"task": "Own", "width": 3, "kind": "plain", "sides": ()}.items() <= CONFIG.effective.items()


@dataclasses.dataclass(frozen=True)
class Taken(Task):
    steps: int = 3


class Bare(Task):
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Headless(Task):
    headline = "loss"


@dataclasses.dataclass(frozen=True)
class Loose(Task):
    sizes: Any = ()


def test_tuples_in_tuples_survive_a_file():
    config = CONFIG.replace(task=Loose(((1, 2), (3,))))
    assert Config.from_json(config.to_json()) == config


def test_a_field_that_is_not_hashable_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"the field sizes of the task Loose must be hashable, .*unhashable type: 'list'"
    ):
        CONFIG.replace(task=Loose([1]))


def test_a_field_that_no_file_can_hold_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="the fields of Loose can't be written to a file: Object of type complex is"):
        RunFolder(tmp_path / "run", CONFIG.replace(task=Loose(1j)))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Own(width=0), "width must be at least 1, got 0."),
        (Own(width="3"), "width must be a whole number, got '3'."),
        (Own(sides=(1.5,)), "sides must be a tuple, each entry of it a whole number, got (1.5,)."),
        (Own(sides=[1]), "sides must be a tuple, each entry of it a whole number, got [1]."),
        (Taken(), "the fields of a task must have other names than those of Config, got steps."),
        (Bare(), "the task Bare must be a dataclass: put @dataclasses.dataclass(frozen=True) above it."),
        (Headless(), "Headless.headline must be a Headline, got 'loss'."),
        ("digits", "task must be an instance of Task, got digits."),
        (Own, f"task must be an instance of Task, got {Own}."),
    ],
)
def test_what_is_no_task_is_one_sentence(task, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - it is compared below.
        dataclasses.replace(CONFIG, task=task)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("digits", "a task is a JSON object, got 'digits'."),
        ({}, "the class of a task must be package.module:Class, got None."),
        ({"class": "json"}, "the class of a task must be package.module:Class, got 'json'."),
        ({"class": "json:loads"}, "'json:loads' is not a subclass of Task."),
        ({"class": "pathlib:Path"}, "'pathlib:Path' is not a subclass of Task."),
        ({"class": "nowhere:Task"}, "the task 'nowhere:Task' can't be imported (ModuleNotFoundError: No module named"),
        ({"class": "json:Task"}, "the task 'json:Task' can't be imported (AttributeError: "),
        ({"class": "lsgd_jax.tasks:Regression", "depth": 3}, "unknown fields of the task 'lsgd_jax.tasks:Regression'"),
        ({"class": "lsgd_jax.tasks:Regression", "width": 0}, "width must be in [1, 2^16), got 0."),
        ({"class": "lsgd_jax.tasks:Regression", "width": "0"}, "width must be a whole number, got '0'."),
    ],
)
def test_a_file_that_names_no_task_is_one_sentence(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - it is compared below.
        Task.from_dict(fields)
    assert str(error.value).startswith(message)
    text = json.dumps(json.loads(PRESETS["digits"].to_json()) | {"task": fields})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Config.from_json(text)
    assert str(error.value).startswith(message)


def test_a_script_has_the_name_by_which_others_import_it(monkeypatch):
    script = types.ModuleType("__main__")
    script.__file__ = "folder/mine.py"
    script.Mine = dataclasses.dataclass(frozen=True)(type("Mine", (Own,), {"__module__": "__main__"}))
    monkeypatch.setitem(sys.modules, "__main__", script)
    fields = script.Mine(width=5).to_dict()
    assert fields["class"] == "mine:Mine"
    assert Task.from_dict(fields) == script.Mine(width=5)


def test_a_task_that_no_file_can_name_is_one_sentence():
    @dataclasses.dataclass(frozen=True)
    class Inner(Task):
        pass

    @dataclasses.dataclass(frozen=True)
    class Held(Task):
        held: object = None

    with pytest.raises(ValueError, match=r"Inner must be at the top level of a module, so that runs can name it\.$"):
        Inner().to_dict()
    with pytest.raises(ValueError, match=r"^the fields of Held can't be written to a file: Object of type object is"):
        Held(object()).to_dict()


def test_a_headline_says_how_it_is_shown():
    error, loss = Classification.headline, Headline()
    assert (error.center, error.workers, error.text(0.03061)) == ("center_error", "worker_errors", "3.06%")
    assert (loss.center, loss.workers, loss.text(0.03061)) == ("center_loss", "worker_losses", "0.0306")
    assert error.text(0.5, space=" ") == "50.00 %"
    assert (error.scale, error.unit, loss.scale, loss.unit) == (100, " (%)", 1, "")


def test_what_a_task_has_by_default():
    task = Own()
    assert (str(task), task.has_batch_norm, task.is_streamed) == ("own", False, False)
    for method in (task.data, lambda: task.network(None), lambda: task.measures(None, None), task.blank):
        with pytest.raises(NotImplementedError):
            method()
    check_fields(task)
    assert Data(1, 2) == (1, 2)
