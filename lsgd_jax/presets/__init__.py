"""Presets, one file per experiment; `PRESETS` maps their names to configurations."""

import importlib
import sys
from pathlib import Path

from lsgd_jax import spelling
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError, sentence_of
from lsgd_jax.presets import (
    cnn7_cifar10,
    cnn7_mnist5k,
    diabetes,
    digits,
    language,
    mnist1d,
    resnet20_cifar10,
    resnet50_imagenet,
    vgg16_cifar10,
)

PRESETS: dict[str, Config] = {
    **mnist1d.CONFIGS,
    **digits.CONFIGS,
    **diabetes.CONFIGS,
    **cnn7_mnist5k.CONFIGS,
    **cnn7_cifar10.CONFIGS,
    **resnet20_cifar10.CONFIGS,
    **vgg16_cifar10.CONFIGS,
    **resnet50_imagenet.CONFIGS,
    **language.CONFIGS,
}


def find(name: str) -> Config:
    """Return a preset by its name: one of `PRESETS`, or an own one, whose module is imported.

    A file is imported under its name relative to the current folder, if it lies there, so that commands find it again
    that are run in the same folder; the modules beside it can be imported, too.

    Raises:
      UsageError: if there is none of that name, or its module can't be imported.
    """
    own = spelling.OWN_PRESET.fullmatch(name)
    if own is None:
        if name not in PRESETS:
            raise UsageError(spelling.unknown_preset(name, PRESETS))
        return PRESETS[name]
    module, file = own["module"], Path(own["module"]).resolve()
    if file.suffix == ".py":
        if not file.is_file():
            raise UsageError(f"there is no file {module}: a preset of your own is named as in ./mine.py:preset.")
        folder = Path.cwd() if file.is_relative_to(Path.cwd()) else file.parent
        module = ".".join(file.relative_to(folder).with_suffix("").parts)
        sys.path[:] = dict.fromkeys([str(folder), *sys.path, str(file.parent)])
    try:
        found = importlib.import_module(module)
    except Exception as error:  # Whatever it raises.
        raise UsageError(f"the preset {name} can't be imported: {sentence_of(error, module)}") from error
    if file.suffix == ".py" and Path(found.__file__ or "").resolve() != file:
        raise UsageError(f"the module {module} is another one than {own['module']}: rename the file.")
    preset = getattr(found, own["name"], None)
    if not isinstance(preset, Config):
        there = hasattr(found, own["name"])
        what = f"is not a Config but of type {type(preset).__name__}" if there else "is not there"
        raise UsageError(f"{own['name']} in {own['module']} {what}: write {own['name']} = Config(task=...).")
    return preset
