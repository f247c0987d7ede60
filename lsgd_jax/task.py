"""Tasks: the examples, the network and the loss that workers train, and the measures that a run reports.

A task of one's own is a frozen dataclass with three methods, and works with every command:

    @dataclasses.dataclass(frozen=True)
    class Sine(Task):
        width: int = 64
        \"\"\"Units of the hidden layer: the option --width with this help.\"\"\"

        def data(self, data_dir=None): ...
        def network(self, rngs): ...
        def measures(self, network, examples): ...

    preset = Config(task=Sine(), steps=1000, learning_rate=0.1)  # lsgd train mypackage.sine:preset --width 32
"""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, get_type_hints

from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.checks import check_type, is_checkable
from lsgd_jax.data.examples import Data, Stream

if TYPE_CHECKING:
    from flax import nnx  # It takes a while to import, and few who read a configuration need it.

__all__ = ["Data", "Headline", "Stream", "Task"]


class Headline(NamedTuple):
    """The measure by which runs and methods are compared; lower is better."""

    name: str = "loss"
    """Name among the task's measures."""
    title: str = "test loss"
    """Title in figures and tables."""
    percent: bool = False
    """Whether the measure is a fraction in [0, 1] that is shown in percent."""
    target: float | None = None
    """Value whose time of arrival comparisons report by default; None: none."""
    perplexity: bool = False
    """Whether the measure is a mean cross-entropy in nats, beside which comparisons show its exponential."""

    @property
    def center(self) -> str:
        """Name of the evaluated model's value in the metrics, such as center_error."""
        return f"center_{self.name}"

    @property
    def workers(self) -> str:
        """Name of the workers' values in the metrics, such as worker_errors."""
        return f"worker_{self.name}{'es' if self.name.endswith('s') else 's'}"

    @property
    def scale(self) -> int:
        """Factor of the values in figures."""
        return 100 if self.percent else 1

    @property
    def unit(self) -> str:
        """End of an axis label."""
        return " (%)" if self.percent else ""

    def text(self, value: float, space: str = "") -> str:
        """Format a value, with a space before the percent sign if it is given."""
        return f"{value:.2%}".replace("%", f"{space}%") if self.percent else f"{value:.4f}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What workers train. A subclass is a frozen dataclass whose fields become options of the command line.

    Fields have other names than those of `lsgd_jax.config.Config`, and defaults.
    """

    headline: ClassVar[Headline] = Headline()

    def data(self, data_dir: Path | str | None = None) -> Data:
        """Load the examples; the result is the same to the bit every time.

        Args:
          data_dir: folder of prepared data sets, `--data-dir`; None if it is not given.
        """
        raise NotImplementedError

    def network(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Make the network at its start.

        Its variables are `nnx.Param`, which workers exchange, and with `has_batch_norm` also `nnx.BatchStat`, which
        stay each worker's own. Networks of other libraries and plain functions of parameters come as
        `lsgd_jax.models.Adapted`.
        """
        raise NotImplementedError

    def measures(self, network: "nnx.Module", examples: Any) -> dict[str, Float[Array, " examples"]]:
        """Return a number per test example by name, "loss" and the headline among them; jittable.

        Args:
          network: in evaluation mode.
          examples: some test examples, without a worker axis. They may be padding, whose numbers are left out.
        """
        raise NotImplementedError

    def loss(self, network: "nnx.Module", batch: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        """Return the training loss of a worker's batch; jittable. By default, the mean of the measure "loss".

        Args:
          network: in training mode.
          batch: examples of one worker, without a worker axis.
          key: random key of the worker's step, for dropout and augmentation.
        """
        del key
        return self.measures(network, batch)["loss"].mean()

    def with_random_targets(self, batch: Any, key: PRNGKeyArray) -> Any:
        """Return a batch with random targets in place of its own, for experiments with corrupted workers; jittable."""
        raise NotImplementedError

    def blank(self) -> Data:
        """Return data of the same shapes with any values, for compiling without the data. By default, the data."""
        return self.data()

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has batch normalization, and thus batch statistics."""
        return False

    @property
    def is_streamed(self) -> bool:
        """Whether the training examples are a `Stream`."""
        return False

    @property
    def counted_in(self) -> tuple[str, int]:
        """Return what comparisons count training data in, such as tokens, and how many of them an example has."""
        return "examples", 1

    def no_effect(self, name: str) -> str | None:
        """Return why a field has no effect, given the others, as the end of a sentence; None if it has one."""
        del name
        return None

    def check(self) -> None:
        """Raise ValueError if a field is out of range; their types have been checked."""

    @property
    def fields(self) -> dict[str, Any]:
        """Values of the fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        """Return a short name, for titles and names of run folders."""
        return type(self).__name__.lower()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; fields that the changes leave without effect become the defaults.

        Raises:
          ValueError: if a changed field has no effect.
        """
        task = dataclasses.replace(self, **changes)
        idle = task.idle
        for name in changes.keys() & idle.keys():
            raise ValueError(f"{name} has no effect {task.no_effect(name)}.")
        return dataclasses.replace(task, **idle)

    @property
    def idle(self) -> dict[str, Any]:
        """Defaults of those fields that have another value and no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        others = (name for name, value in self.fields.items() if value != defaults[name])
        return {name: defaults[name] for name in others if self.no_effect(name)}

    def to_dict(self) -> dict[str, Any]:
        """Return the name of the class, `package.module:Class`, and the fields that have an effect, for `from_dict`.

        Raises:
          ValueError: if no other process could find the class, or a field is not one for JSON.
        """
        fields = {name: of for name, of in self.fields.items() if not self.no_effect(name)}
        try:
            json.dumps(fields)
        except TypeError as error:
            raise ValueError(f"the fields of {type(self).__name__} can't be written to a file: {error}.") from None
        return {"class": _name_of(type(self))} | fields

    @staticmethod
    def from_dict(fields: Any) -> "Task":
        """Return the task that `to_dict` described. This imports the module of its class.

        Raises:
          ValueError: if there is no such subclass of `Task`, or it has no such fields.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a task is a JSON object, got {str(fields)[:40]!r}.")
        name, kind = fields.get("class"), named(fields.get("class"))
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            raise ValueError(f"{name!r} is not a subclass of Task.")
        values = {name: _as_tuples(of) for name, of in fields.items() if name != "class"}
        if unknown := values.keys() - {field.name for field in dataclasses.fields(kind)}:
            raise ValueError(f"unknown fields of the task {name!r}: {', '.join(sorted(unknown))}.")
        task = kind(**values)
        check_fields(task)
        return task.replace()


def check_fields(task: Task, taken: Collection[str] = ()) -> None:
    """Raise ValueError if a task is not a frozen dataclass whose fields are of their types and have no taken name."""
    kind = type(task)
    if "__dataclass_fields__" not in vars(kind):
        what = "a dataclass: put @dataclasses.dataclass(frozen=True) above it"
        raise ValueError(f"the task {kind.__name__} must be {what}.")
    if not isinstance(task.headline, Headline):
        raise ValueError(f"{kind.__name__}.headline must be a Headline, got {task.headline!r}.")
    hints = get_type_hints(kind)
    for name, value in task.fields.items():
        if name in taken:
            raise ValueError(f"the fields of a task must have other names than those of Config, got {name}.")
        if is_checkable(hints[name]):
            check_type(name, value, hints[name])
        try:
            hash(value)
        except TypeError as error:
            demand = "hashable, such as a tuple in place of a list"
            raise ValueError(f"the field {name} of the task {kind.__name__} must be {demand} ({error}).") from None
    task.check()


def _as_tuples(value: Any) -> Any:
    """A value that was read from JSON, whose lists were tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def of_earlier_version(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration with a task, from one of the versions that had classification alone."""
    own = fields.keys() & {"dataset", "model", "width", "dtype", "image_size"}
    task = {"class": "lsgd_jax.tasks.classification:Classification"} | {name: fields[name] for name in own}
    return {name: value for name, value in fields.items() if name not in own} | {"task": task}


def named(name: Any) -> Any:
    """Return what the name of a task, package.module:Class, stands for; this imports the module.

    Raises:
      ValueError: if there is nothing of that name, or the module can't be imported.
    """
    if not isinstance(name, str) or name.count(":") != 1:
        raise ValueError(f"the class of a task must be package.module:Class, got {name!r}.")
    module, path = name.split(":")
    try:
        found = sys.modules["__main__"] if module == _main() else importlib.import_module(module)
        return functools.reduce(getattr, path.split("."), found)
    except Exception as error:  # Whatever the module raises.
        why = f"{type(error).__name__}: {error}"
        where = "run the command in the folder of its module, or put that on PYTHONPATH"
        raise ValueError(f"the task {name!r} can't be imported ({why}): {where}.") from None


def _name_of(kind: type) -> str:
    """The name of a class, by which `named` finds it, also from another process.

    Raises:
      ValueError: if it is inside a function.
    """
    if "<locals>" in kind.__qualname__:
        where = "at the top level of a module, so that runs can name it"
        raise ValueError(f"the task {kind.__qualname__} must be {where}.")
    module = _main() if kind.__module__ == "__main__" else kind.__module__
    return f"{module}:{kind.__qualname__}"


def _main() -> str:
    """The name by which other processes import the script that this one runs; __main__ in a notebook."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):  # Of python -m.
        return spec.name
    return Path(getattr(main, "__file__", None) or "__main__").stem
