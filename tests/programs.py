"""Programs of runs, made once for all runs of a configuration in a process."""

import contextlib

import pytest

from lsgd_jax.train import loop

_made = {}


def _once(make, key, /, *arguments, **options):
    if (make, key) not in _made:
        _made[make, key] = make(*arguments, **options)
    return _made[make, key]


@contextlib.contextmanager
def shared():
    """Let runs of one configuration share their programs, as steps and evaluations of one run do.

    They are functions of the configuration: to trace, lower and load them takes most of a small run. For tests of what
    runs do with them; those of programs, or that patch what these are made of, make their own.
    """
    program_of, evaluation, evaluated_model = loop.program_of, loop.evaluation, loop.evaluated_model
    with pytest.MonkeyPatch.context() as patched:
        # Those of other seeds are the same: see test_programs_are_compiled_once_for_all_seeds of tests/compare.
        patched.setattr(
            loop, "program_of", lambda config, *rest: _once(program_of, config.replace(seed=0), config, *rest)
        )
        patched.setattr(loop, "evaluated_model", lambda config: _once(evaluated_model, config, config))
        patched.setattr(
            loop,
            "evaluation",
            lambda task, model, center, *rest, **options: _once(
                evaluation, center, task, model, center, *rest, **options
            ),
        )
        yield
