"""Many runs as one program are the runs that the package trains one by one."""

import pytest

from benchmarks.methods.many_runs import ManyRuns, Run
from lsgd_jax.presets import PRESETS
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.tuning import grid

SMALL = {"groups": 1, "workers": 4, "width": 0.1, "steps": 24, "batch_size": 8, "eval_every": 24}
SMALL |= {"checkpoint_every": 0, "corrupt_workers": 1}


@pytest.mark.parametrize(("method", "preset"), [("quorum", "digits"), ("easgd", "mnist1d")])
def test_each_is_the_run_with_its_seed_options_and_corrupted_workers(method, preset, tmp_path):
    """A network of dense layers and one of convolutions."""
    config = PRESETS[preset].replace(**SMALL, method=method)
    first, *_, last = (config.replace(**values) for values in grid(config))
    runs = [Run(3, first.replace(corrupt_workers=0)), Run(4, last.replace(corrupt_workers=2))]
    program = ManyRuns(config, config.task.data())
    assert program.kinds == ["own", "tail_mean"]
    found = {validation: program.errors(runs, validation=validation) for validation in (False, True)}
    for validation, i, kind in [(False, 0, "own"), (True, 1, "tail_mean")]:
        seed, of = runs[i]
        alone = of.replace(seed=seed, validation=0.2 * validation, evaluated_model=None if kind == "own" else kind)
        error = train_and_evaluate(alone, tmp_path / kind, lines=False)
        # Rounding may turn single ones of a thousand examples.
        assert found[validation][kind][i] == pytest.approx(error, abs=0.004)
