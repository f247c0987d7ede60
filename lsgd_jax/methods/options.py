"""The options of methods as fields of a configuration, read from their builders' signatures and docstrings."""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from lsgd_jax.methods.method import Method


@functools.cache
def option_types(build: Callable) -> dict[str, Any]:
    """The types of what a configuration takes for the options of a builder, None for the builder's own default.

    Where a builder takes a number, a schedule or an array, a configuration takes the number. An option that is none
    of number, string, choice or truth value is for Python alone.
    """
    found = {}
    for name, hint in get_type_hints(build).items():
        if plain := [each for each in _members(hint) if each in (bool, int, float, str) or get_origin(each) is Literal]:
            found[name] = Union[tuple(each for each in plain if each is not int or float not in plain)] | None  # noqa: UP007
    return found


def fields_of(methods: Mapping[str, Method]) -> Iterator[tuple[str, Any, str]]:
    """The name, type and help text of each option that a method has.

    Args:
      methods: by name.
    """
    having: dict[str, list[str]] = {}
    for method, row in methods.items():
        for name in row.options.keys() & option_types(row.build).keys():
            having.setdefault(name, []).append(method)
    for name in dict.fromkeys(name for row in methods.values() for name in row.options if name in having):
        texts: dict[str, list[str]] = {}
        for method in having[name]:
            text, default = _described(methods[method].build).get(name, ""), methods[method].options[name]
            text = text.removesuffix(".") + ("." if default is None else f" (default {default}).")
            texts.setdefault(text, []).append(method)
        hints = [option_types(methods[method].build)[name] for method in having[name]]
        yield name, _any_of(hints), _help(texts)


def description(build: Callable, name: str) -> str:
    """What the docstring of a method's builder says of an option."""
    return _described(build).get(name, "")


def with_options_of(methods: Mapping[str, Method]) -> Callable[[type], type]:
    """A decorator that gives a class the options of methods: annotations with help for the command line, and None."""

    def decorated(fields: type) -> type:
        for name, hint, text in fields_of(methods):
            if name not in fields.__annotations__:
                about = tyro.conf.arg(help=text, help_behavior_hint=_default)
                fields.__annotations__[name] = Annotated[hint, about]
                setattr(fields, name, None)
        return fields

    return decorated


def _default(value: str) -> str:
    """What the help says after an option's text, in which the methods' defaults are."""
    return "" if value == "None" else f"(default: {value})"


def _members(hint: Any) -> Iterator[Any]:
    """The alternatives of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        for each in get_args(hint):
            yield from _members(each)
    else:
        yield hint


def _any_of(hints: list[Any]) -> Any:
    """The type of what any of these types has, with one list of choices."""
    members = dict.fromkeys(each for hint in hints for each in _members(hint))
    choices = dict.fromkeys(choice for each in members if get_origin(each) is Literal for choice in get_args(each))
    others = [each for each in members if get_origin(each) is not Literal]
    return Union[(*([Literal[tuple(choices)]] if choices else []), *others)]


@functools.cache
def _described(build: Callable) -> dict[str, str]:
    """What a builder's docstring says of its arguments, each on one line."""
    arguments = docstring_parser.parse(build.__doc__ or "").params
    return {each.arg_name: " ".join((each.description or "").split()) for each in arguments}


def _help(texts: Mapping[str, list[str]]) -> str:
    """One line per description, with the methods whose it is."""
    return "\n".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())
