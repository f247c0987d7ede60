"""What `lsgd` says without importing JAX, which takes a second: overview, version, and what is misspelled."""

import importlib.metadata
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from lsgd_jax import spelling
from lsgd_jax.tracking.output import say

COMMANDS = {
    "train": "Train a preset with one method and write a run folder: configuration, environment, metrics and a figure.",
    "compare": "Compare methods on a preset over several seeds; writes a table and a figure.",
    "figure": "Draw a figure of the paper, and write its curves (CSV) and numbers (JSON).",
    "data": "Prepare a data set once, from archives in downloads/manual in the data folder or by downloading them.",
    "report": "Write an HTML report on one or more runs, viewable offline: lsgd report runs/a runs/b.",
    "simulate": "Simulate methods in virtual time, with heterogeneous workers and network costs.",
    "chaos": "Train a preset with --asynchronous posted, inject faults into its processes, and sum up what they did.",
    "replay": "Train a run of --asynchronous posted again from its events, and compare all parameters to the bit.",
    "info": "Print versions and devices, or the communication cost or the memory of a preset.",
    "launch": "Train in several processes on this machine, as if on several hosts: lsgd launch --processes 2 -- train "
    "mnist1d.",
    "join": "Add a process to a posted run, from any machine that sees its folder: lsgd join runs/a.",
    "compile": "Compile a preset ahead of time for a TPU topology; report communication, memory and FLOPs. No TPU "
    "needed.",
}
"""Every command with its summary, which is the first line of its docstring, too."""
TAKE_PRESET = ("train", "compare", "simulate", "compile", "chaos")
"""Commands whose first argument is a preset."""
PRESETS = {
    **dict.fromkeys(("mnist1d", "digits"), "Classification"),
    "diabetes": "Regression",
    **dict.fromkeys(("cnn7-mnist5k-4", "cnn7-mnist5k-16", "cnn7-cifar10-4", "cnn7-cifar10-16"), "Classification"),
    **dict.fromkeys(("resnet20-cifar10-4", "resnet20-cifar10-16", "vgg16-cifar10-4"), "Classification"),
    "resnet50-imagenet-4": "Classification",
    **dict.fromkeys(("tragedies", "dialects", "gpt-1b"), "Language"),
}
"""The names in `lsgd_jax.presets.PRESETS`, whose configurations need JAX, with the classes of their tasks."""
OPTIONS_OF_COMMANDS = {
    "train": "run-dir data-dir resume tensorboard processes host",
    "compare": "methods seeds out tune target data-dir",
    "figure": "out runs model dataset",
    "data": "data-dir tokenizer",
    "report": "out watch",
    "simulate": "methods costs-only parameters target out data-dir step-seconds slow variation varies-by sigma tail "
    "pause-every pause-seconds trace local-bandwidth local-latency global-bandwidth global-latency servers absences",
    "chaos": "minutes faults-per-hour processes plan out data-dir",
    "replay": "data-dir",
    "info": "bytes memory chips-per-worker",
    "launch": "processes devices-per-process restarts hang-seconds detach join-timeout heartbeat",
    "join": "workers first data-dir tensorboard host",
    "compile": "topology hlo",
}
OPTIONS_OF_TASKS = {
    "Classification": "dataset model width dtype image-size",
    "Regression": "width",
    "Language": "text vocabulary context width depth heads activation remat dtype",
}
OPTIONS_OF_PRESETS = (
    "learning-rate local-optimizer momentum adam-b1 adam-b2 weight-decay clip-norm learning-rate-schedule "
    "learning-rate-warmup learning-rate-decay learning-rate-drops learning-rate-drops-in learning-rates "
    "steps batch-statistics statistics-batches batch-size batch validation data-processes sampling groups "
    "workers chips-per-worker method period elect-by election-examples evaluated-model tail-share "
    "corrupt-workers corruption asynchronous staleness min-step-seconds slowdowns tune-learning-rates "
    "tune-periods eval-every checkpoint-every keep-checkpoints seed pull global-pull global-period window "
    "pull-at stale-pull global-stale-pull broadcast wire delay revive fragments overlap election "
    "center-pull mixing outer-learning-rate outer-momentum kappa prox trim"
)
"""The options of commands, those of tasks by the class, and those of every preset."""


def may_run(arguments: Sequence[str]) -> bool:
    """Whether a command line names a command, and nothing in it is known to be misspelled."""
    return bool(arguments) and arguments[0] in COMMANDS and problem(arguments) is None


def problem(arguments: Sequence[str], of_preset: Collection[str] | None = None) -> str | None:
    """A sentence on a command line whose preset is missing or unknown, or that has an unknown option; else None.

    Args:
      arguments: the name of a command and what follows it.
      of_preset: the options of its preset. None: those that are known without JAX, which are not all if the preset, or
        an option of a method, does not come with the package; such a command line is passed.
    """
    command, *others = arguments
    shown, flags = f"lsgd {command}", OPTIONS_OF_COMMANDS[command].split()
    if command in TAKE_PRESET:
        own = own_preset(arguments)
        known = [*PRESETS, *([own] if own else [])]
        first = others[0] if others and not others[0].startswith("-") else None
        if first is None and not {"-h", "--help"} & {*others}:
            if later := next((each for each in others if each in known), None):
                return f"the preset comes first, as in {shown} {later}, and options after it."
            return f"{command} needs a preset, as in {shown} {known[0]}; there are {', '.join(known)}."
        if first is not None and first not in known:
            return spelling.unknown_preset(first, PRESETS)
        if own and of_preset is None:
            return None
        shown += f" {first}" if first else ""
        flags += _options_of_preset(first) if of_preset is None else of_preset
    flags = [f"--{name.replace('_', '-')}" for name in dict.fromkeys(flags)]
    for argument in others:
        if argument == "--":
            return None
        given = argument.partition("=")[0].replace("_", "-")
        if given.startswith("--") and given not in (*flags, "--help") and f"--{given[5:]}" not in flags:
            if of_preset is None and command in TAKE_PRESET and _in_methods(given):
                return None
            return spelling.unknown("option", given, sorted(flags), f"{shown} --help lists those that there are")
    return None


def _options_of_preset(preset: str | None) -> list[str]:
    """The options of a preset of the package, or of all."""
    kinds = {PRESETS[preset]} if preset else {*OPTIONS_OF_TASKS}
    return [*OPTIONS_OF_PRESETS.split(), *(name for kind in kinds for name in OPTIONS_OF_TASKS[kind].split())]


def _in_methods(flag: str) -> bool:
    """Whether an option may be one of a method that does not come with the package."""
    name = re.compile(rf"\b{re.escape(flag[2:].replace('-', '_'))}\b")
    return any(name.search(file.read_text()) for file in (Path(__file__).parents[1] / "methods").glob("*.py"))


def own_preset(arguments: Sequence[str]) -> str | None:
    """The preset in a command line that does not come with the package, if there is one."""
    if not arguments or arguments[0] not in TAKE_PRESET:
        return None
    places = [i for i, x in enumerate(arguments) if i and (x in PRESETS or spelling.OWN_PRESET.fullmatch(x))]
    if not places:
        return None
    found = arguments[min(places, key=lambda i: arguments[i - 1].startswith("-"))]  # Rather not the value of an option.
    return None if found in PRESETS else found


def answer(arguments: Sequence[str]) -> int | None:
    """Answer a command line that `may_run` denies; returns the exit code, or None if it is only printed to.

    Args:
      arguments: of the command line.
    """
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(_overview(min(shutil.get_terminal_size().columns, 120)))
        case ["--version", *_]:
            print(f"lsgd {importlib.metadata.version('lsgd-jax')}")
        case [word, *_]:
            wrong = problem(arguments) if word in COMMANDS else spelling.unknown("command", word, COMMANDS)
            say(f"lsgd: {wrong}", sys.stderr)
            return 2
    return None


def _overview(columns: int) -> str:
    """Usage, commands and first steps, for a terminal of so many columns."""
    start = max(map(len, COMMANDS)) + 4
    commands = []
    for name, text in COMMANDS.items():
        first = f"  {name}".ljust(start)
        commands.append(textwrap.fill(text, columns, initial_indent=first, subsequent_indent=" " * start))
    return "\n".join(
        [
            "usage: lsgd [-h] [--version] COMMAND ...",
            "",
            "Leader SGD in JAX.",
            "",
            *commands,
            "",
            "lsgd train mnist1d trains on data that comes with the package;",
            "lsgd COMMAND --help shows the options of a command,",
            "and lsgd train PRESET --help those of training.",
        ]
    )
