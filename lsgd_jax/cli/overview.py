"""What `lsgd` says without importing JAX, which takes a second: overview, version, misspelled commands and presets."""

import importlib.metadata
import shutil
import sys
import textwrap
from collections.abc import Sequence

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
PRESETS = (
    *("mnist1d", "digits", "diabetes", "cnn7-mnist5k-4", "cnn7-mnist5k-16", "cnn7-cifar10-4", "cnn7-cifar10-16"),
    *("resnet20-cifar10-4", "resnet20-cifar10-16", "vgg16-cifar10-4", "resnet50-imagenet-4"),
    *("tragedies", "dialects", "gpt-1b"),
)
"""The names in `lsgd_jax.presets.PRESETS`, whose configurations need JAX."""


def may_run(arguments: Sequence[str]) -> bool:
    """Whether a command line names a command and, where that takes one, a preset that there may be."""
    match arguments:
        case [command, preset, *_] if command in TAKE_PRESET:
            return preset in PRESETS or preset.startswith("-") or ":" in preset  # An option, or one of your own.
        case [command, *_]:
            return command in COMMANDS
    return False


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
        case [command, preset, *_] if command in TAKE_PRESET:
            say(f"lsgd: {spelling.unknown_preset(preset, PRESETS)}", sys.stderr)
            return 2
        case [word, *_]:
            say(f"lsgd: {spelling.unknown('command', word, COMMANDS)}", sys.stderr)
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
