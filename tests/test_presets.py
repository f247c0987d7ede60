"""Every preset, built as it is, and trained for two steps at reduced width on data that are made here."""

import importlib
import math
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lsgd_jax import presets, train
from lsgd_jax.data import DESCRIPTIONS
from lsgd_jax.models import MODELS, VGG16, ResNet20
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Classification, Language
from lsgd_jax.tracking.run_folder import read_metrics
from tests.networks import drawn

MODULES = [importlib.import_module(f"lsgd_jax.presets.{info.name}") for info in pkgutil.iter_modules(presets.__path__)]


def test_every_preset_is_in_the_table_and_its_docstring_tells_how_to_run_it():
    found = {name: module for module in MODULES for name in getattr(module, "CONFIGS", {})}
    assert set(found) == set(PRESETS)
    for name, module in found.items():
        assert f" {name}" in module.__doc__


@pytest.mark.parametrize("name", [name for name in PRESETS if "cifar" in name or "imagenet" in name])
def test_the_paper_s_presets_tell_figure_and_expected_error(name):
    [module] = [module for module in MODULES if name in getattr(module, "CONFIGS", {})]
    assert module.__doc__.startswith("Figure")
    assert "Read off the paper" in module.__doc__
    assert "lsgd figure F" in module.__doc__
    assert PRESETS[name].tune_periods == (4, 16, 64)


TASKS = {str(PRESETS[name].task): name for name in reversed(PRESETS)}
"""The first preset of each task; its others differ in their groups."""


@pytest.mark.parametrize("name", TASKS.values())
def test_the_network_of_a_preset_is_built_at_full_size(name):
    task = PRESETS[name].task
    model = nnx.eval_shape(lambda: task.network(nnx.Rngs(0)))
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) > (5_000 if isinstance(task, Classification) else 300)
    if isinstance(task, Classification):
        shape = {"mnist1d": (40, 1), "digits": (8, 8, 1), "mnist5k": (28, 28, 1), "cifar10": (28, 28, 3)}
        build, dimensions = MODELS[task.model]
        example = shape.get(task.dataset, (224, 224, 3))
        assert dimensions in (None, len(example))
        other = nnx.eval_shape(
            lambda: build(example, DESCRIPTIONS[task.dataset].classes, width=task.width, rngs=nnx.Rngs(0))
        )
        assert jax.tree.map(jnp.shape, nnx.state(other)) == jax.tree.map(jnp.shape, nnx.state(model))


class FirstBlocks(ResNet20):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.blocks = nnx.List(self.blocks[::3])


class FirstConvolutions(VGG16):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.stages = nnx.List([nnx.List([stage[0]]) for stage in self.stages[:4]])  # The fifth is like the fourth.


def starting_drawn(build):
    return lambda *arguments, rngs, **options: drawn(lambda: build(*arguments, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("name", TASKS.values())
def test_two_steps_at_reduced_width_and_depth(name, prepared, tmp_path, monkeypatch):
    """With ResNet-20 in place of ResNet-50, and the first layers of each stage alone: each program takes long to
    compile."""
    shallow = {"resnet20": (FirstBlocks, 3), "vgg16": (FirstConvolutions, 3)}
    for model, (build, dimensions) in (MODELS | shallow).items():
        monkeypatch.setitem(MODELS, model, (starting_drawn(build), dimensions))
    task = PRESETS[name].task
    small = {"width": 0.05 if isinstance(task, Classification) else 2}
    if isinstance(task, Language):
        small = {"width": 8, "heads": 1, "depth": 1, "context": 8, "text": "tragedies", "vocabulary": 128}
    small |= {
        "steps": 2,
        "eval_every": 2,
        "batch_size": 2,
        "period": 1,
        "checkpoint_every": 0,
    }
    small |= {"groups": min(PRESETS[name].groups, 2), "workers": 2}  # A device each.
    config = PRESETS[name].replace(**small)
    smaller = {"statistics_batches": 1, "global_period": 2, "image_size": 32, "data_processes": 0}
    if config.effective.get("model") == "resnet50":
        config = config.replace(model="resnet20")
    config = config.replace(
        **{name: value for name, value in smaller.items() if name in config.flat and config.has_effect(name)}
    )
    embedded = config.effective.get("dataset") in ("mnist1d", "digits", "mnist5k", None)
    measured = train.train_and_evaluate(config, tmp_path / "run", data_dir=None if embedded else prepared[0])
    assert 0 <= measured <= (1 if isinstance(task, Classification) else 6 if isinstance(task, Language) else 2)
    exchanges = read_metrics(tmp_path / "run", "exchange")
    assert [entry["step"] for entry in exchanges] == [1, 2]
    assert "leader" in exchanges[-1]
