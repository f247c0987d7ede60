"""Sentences about words that are not known, with the nearest one that is. They are made without JAX."""

import difflib
import re
from collections.abc import Collection

OWN_PRESET = re.compile(r"(?P<module>[^:]+):(?P<name>[A-Za-z_]\w*)")
"""Name of a preset that does not come with the package: `package.module:preset` or `./file.py:preset`."""


def unknown(kind: str, word: str, known: Collection[str], otherwise: str = "") -> str:
    """A sentence that says that there is no such word, and which is nearest.

    Args:
      kind: of the word, such as "command".
      word: as given.
      known: the words that there are.
      otherwise: what to say if none is near; by default, all that there are.

    Example:
      >>> print(unknown("preset", "digts", ["mnist1d", "digits"]))
      there is no preset 'digts'; did you mean digits?
    """
    close = nearest(word, known)
    otherwise = otherwise or f"there are {', '.join(known)}"
    return f"there is no {kind} {word!r}; " + (f"did you mean {close}?" if close else f"{otherwise}.")


def unknown_preset(name: str, known: Collection[str]) -> str:
    """A sentence that says that there is no such preset, from the names of those that come with the package."""
    return unknown("preset", name, known, f"there are {', '.join(known)}, and your own, as in ./mine.py:preset")


def must_be_one(name: str, value: str, choices: Collection[str]) -> str:
    """A sentence that says which values an option can have, and which of them is nearest to the given one.

    Args:
      name: of the option.
      value: as given.
      choices: the values that it can have.

    Example:
      >>> print(must_be_one("wire", "int4", ["bfloat16", "int8"]))
      wire must be one of bfloat16, int8, got 'int4'; did you mean int8?
    """
    return f"{name} must be one of {', '.join(choices)}, got {value!r}{or_nearest(value, choices)}"


def or_nearest(word: str, known: Collection[str]) -> str:
    """The end of a sentence about a word: a question whether the nearest one is meant, or a period if none is near."""
    close = nearest(word, known)
    return f"; did you mean {close}?" if close else "."


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that has a word as its initials, or else looks most like it; None if none does.

    Upper case is as lower case, and an underscore as a hyphen.

    Example:
      >>> nearest("--lr", ["--learning-rate", "--wire"]), nearest("Local-SGD", ["local_sgd"]), nearest("cat", ["dog"])
      ('--learning-rate', 'local_sgd', None)
    """
    by_stem = {_stem(each): each for each in known}
    stem = _stem(word)
    initials = ("".join(part[:1] for part in each.split("-")) for each in by_stem)
    alike = [each for each, parts in zip(by_stem, initials, strict=True) if len(parts) > 1 and parts == stem]
    alike = alike or difflib.get_close_matches(stem, by_stem, n=1, cutoff=0.7)
    return by_stem[alike[0]] if alike else None


def _stem(word: str) -> str:
    return word.replace("_", "-").lstrip("-").lower()
