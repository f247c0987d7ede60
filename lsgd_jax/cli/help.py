"""The help of the commands: options in groups, those that have an effect, with the values that they will have."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from lsgd_jax import presets
from lsgd_jax.checks import choices_of
from lsgd_jax.config import Config
from lsgd_jax.methods import METHODS
from lsgd_jax.methods.options import description
from lsgd_jax.optimizers import OptimizerOptions

GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": tuple(field.name for field in dataclasses.fields(OptimizerOptions)),
    "training": ("steps", "batch_size", "batch", "sampling", "validation", "data_processes", "seed"),
    "workers and method": (
        "groups",
        "workers",
        "chips_per_worker",
        "method",
        "period",
        "elect_by",
        "election_examples",
    ),
    "communication": ("broadcast", "wire", "delay", "fragments", "overlap", "election", "mixing"),
    "asynchronous training": ("asynchronous", "staleness", "min_step_seconds", "slowdowns"),
    "checkpointing": ("checkpoint_every", "keep_checkpoints"),
    "evaluation": ("eval_every", "evaluated_model", "tail_share", "batch_statistics", "statistics_batches"),
    "corrupted workers": ("corrupt_workers", "corruption"),
    "tuning": ("tune_learning_rates", "tune_periods"),
}
"""Fields of a configuration by group; other options of methods are with the method."""
_COLUMNS, _LEFT = 120, 30
"""Width of the widest help, and of its flags and values."""


def show(name: str, command: Callable, arguments: Sequence[str], own: str | None, refused: Collection[str]) -> str:
    """The help of a command, as text for the terminal.

    Args:
      name: of the command.
      command: its function, whose arguments are its options.
      arguments: the command line after the command; a preset and a method that it names are those shown.
      own: name of a preset that does not come with the package.
      refused: fields of the configuration that the command does not take.
    """
    columns = min(shutil.get_terminal_size().columns, _COLUMNS)
    parsed = docstring_parser.parse(command.__doc__ or "")
    parameters = inspect.signature(command).parameters
    takes_preset = "options" in parameters
    preset = (
        next((each for each in arguments if each == own or each in presets.PRESETS), None) if takes_preset else None
    )
    hints, texts = (
        get_type_hints(command, include_extras=True),
        {each.arg_name: each.description for each in parsed.params},
    )
    of_command = {
        key: _Option(_flag(key, hints[key]), _shown(parameter.default), hints[key], texts[key] or "")
        for key, parameter in parameters.items()
        if key not in ("options", "cluster")
    }
    usage = f"usage: lsgd {name}" + (f" {preset or 'PRESET'}" if takes_preset else "")
    usage += "".join(f" {each.flag}" for each in of_command.values() if not each.flag.startswith("--")) + " [options]"
    about = [textwrap.fill(text, columns) for text in _paragraphs(parsed)[: 1 if preset else None]]
    parts = [usage, *(line for text in about for line in ("", text)), ""]
    width = min(_LEFT, columns // 2 - 6)
    if takes_preset and preset is None:
        parts += ["presets", *(_line(each, _about(of), columns, 22) for each, of in presets.PRESETS.items()), ""]
    parts += [f"options of {name}", *(each.lines(columns, width) for each in of_command.values())]
    if "cluster" in parameters:
        cluster = get_type_hints(command)["cluster"]
        parts += ["", "cluster", *(each.lines(columns, width) for each in _fields(cluster, None).values())]
    if preset is not None:
        parts += _configured(_as_given(presets.find(preset), arguments), refused, columns, width)
    elif takes_preset:
        parts += ["", f"lsgd {name} PRESET --help shows the options that override a preset."]
    return "\n".join(parts)


def tables() -> str:
    """The fields of a configuration in groups, as tables in Markdown; those of methods that no group has come last."""
    options = _fields(Config, None)
    others = [name for name in options if name not in {each for names in GROUPS.values() for each in names}]
    parts = []
    for group, names in (GROUPS | {"options of methods": tuple(others)}).items():
        rows = ["| field | default | |", "|---|---|---|"]
        for name in names:
            of, methods = options.get(name), [each for each in METHODS if name in METHODS[each].options]
            if of is not None:
                choices = [f"{', '.join(_choices(of.hint))}."] if _choices(of.hint) else []
                text = of.text or description(METHODS[methods[0]].build, name)
                of_methods = [f"With {', '.join(methods)}."] if methods and name in others else []
                rows.append(f"| `{name}` | {of.value} | {' '.join([*choices, *text.split(), *of_methods])} |")
        parts.append("\n".join([f"### {group.capitalize()}", "", *rows]))
    return "\n\n".join(parts)


@dataclasses.dataclass
class _Option:
    """An option, as the help shows it."""

    flag: str
    value: str
    hint: Any
    text: str

    def lines(self, columns: int, width: int) -> str:
        """Flag and value on the left, choices and help on the right."""
        choices = "{" + ",".join(_choices(self.hint)) + "} " if _choices(self.hint) else ""
        text = _in_short(re.sub(r"\bNone(: | for )", "by default ", self.text), _COLUMNS - _LEFT - 4 - len(choices))
        if len(choices) > columns - width - 4:
            choices = choices.replace(",", ", ")  # So that lines break between them.
        text = choices + text
        left = f"{self.flag} {self.value}".strip()
        if len(left) > _COLUMNS // 2:
            left, text = self.flag, f"{text} By default {self.value.replace(',', ', ')}."
        return _line(left, text, columns, width)


def _configured(config: Config, refused: Collection[str], columns: int, width: int) -> Iterator[str]:
    """The options of a configuration in groups, and the names of those without an effect in it."""
    options, task = _fields(Config, config), _fields(type(config.task), config.task)
    for name in METHODS[config.method].options.keys() & options.keys() - {"period"}:
        options[name].text = description(METHODS[config.method].build, name)
        options[name].value = _shown(config.effective.get(name))
    shown = [name for name in options if name not in refused and config.has_effect(name)]
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    yield from ("", f"task: {type(config.task).__name__}", *(each.lines(columns, width) for each in task.values()))
    for group in GROUPS:
        names = [name for name in shown if group_of.get(name, "workers and method") == group]
        if names:
            yield from (group, *(options[name].lines(columns, width) for name in names))
    idle = [options[name].flag for name in options if name not in refused and not config.has_effect(name)]
    yield ""
    yield textwrap.fill(
        "With another --method, which --help shows, or beside other options, there are also " + ", ".join(idle) + ".",
        columns,
        break_on_hyphens=False,
    )


def _as_given(config: Config, arguments: Sequence[str]) -> Config:
    """The configuration with the numbers and words that a command line gives, as far as it can have them."""
    given = {}
    for flag, value in itertools.pairwise(itertools.chain(*(each.split("=", 1) for each in arguments))):
        if flag.startswith("--"):
            given[flag[2:].replace("-", "_")] = value
    for name in sorted(given, key=lambda name: name != "method"):
        for kind in (int, float, str):
            with contextlib.suppress(ValueError, TypeError):
                config = config.replace(**{name: kind(given[name])})
                break
    return config


def _fields(kind: Any, values: Any) -> dict[str, _Option]:
    """The fields of a dataclass but for the task, with the values of an instance or, without one, their defaults."""
    texts, hints = _documented(kind), get_type_hints(kind, include_extras=True)
    return {
        field.name: _Option(
            _flag(field.name, hints[field.name]),
            _shown(field.default if values is None else getattr(values, field.name)),
            hints[field.name],
            texts.get(field.name) or "",
        )
        for field in dataclasses.fields(kind)
        if field.name != "task"
    }


@functools.cache
def _documented(kind: type) -> Mapping[str, str]:
    """The docstrings of the fields of a dataclass and of the classes that it extends."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            found |= {of.arg_name: of.description or "" for of in docstring_parser.parse_from_object(each).params}
    return found


def _about(config: Config) -> str:
    """What a preset trains, in a line."""
    workers = f"{config.groups} x {config.workers}" if config.groups > 1 else f"{config.workers}"
    return f"{config.task}, {workers} workers, {config.steps:,} steps of {config.local_optimizer}"


def _paragraphs(parsed: docstring_parser.Docstring) -> list[str]:
    long = (parsed.long_description or "").split("\n\n")
    texts = [parsed.short_description or "", *long]
    if not parsed.blank_after_short_description:
        texts = [" ".join(texts[:2]), *texts[2:]]
    return [" ".join(text.split()) for text in texts if text]


def _line(left: str, right: str, columns: int, width: int) -> str:
    """Two columns, the left one on a line of its own if it is too wide."""
    first = f"  {left}".ljust(width + 2)
    start = "" if len(first) <= width + 2 else first + "\n"
    indent = " " * (width + 4)
    filled = textwrap.fill(
        right,
        columns,
        initial_indent=indent if start else first + "  ",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return start + filled


def _in_short(text: str, length: int) -> str:
    """As many sentences as fit into a length; if not even the first does, as many of its clauses, but at least one."""
    text = " ".join(text.split())
    text = text[:1].upper() + text[1:]
    for separator in (r"(?<=\.) (?=[A-Z])", r"(?<=;) "):
        text, *others = re.split(separator, text)
        for each in others:
            if len(text) + 1 + len(each) > length:
                break
            text += " " + each
        if len(text) <= length:
            break
    return text.removesuffix(";").removesuffix(".") + "."


def _flag(name: str, hint: Any) -> str:
    """How an option is given: by its name or, if it is positional, by its place."""
    positional = get_origin(hint) is Annotated and tyro.conf.Positional in get_args(hint)[1:]
    return name.upper() if positional else "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    """A value as it is given on the command line; nothing for none."""
    if value in (None, inspect.Parameter.empty, dataclasses.MISSING) or isinstance(value, bool):
        return ""
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _choices(hint: Any) -> list[str]:
    """The choices of an option whose type lists them, or whose metavar does."""
    if get_origin(hint) is not Annotated:
        return choices_of(hint)
    kind, *notes = get_args(hint)
    metavars = [text for note in notes if (text := getattr(note, "metavar", None))]
    return metavars[0].strip("{}").split(",") if metavars else choices_of(kind)
