"""The cells of a comparison, a run each: trained into its folder once, and reused after that."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lsgd_jax import files
from lsgd_jax.compare.results import curves
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.tracking.progress import ComparisonProgress
from lsgd_jax.tracking.run_folder import MOST_BYTES, read_config
from lsgd_jax.train import train_and_evaluate

_OF_A_CELL = ("method", "seed", "checkpoint_every")
"""Fields that are not the same in all of a comparison."""


def train_cell(
    out: Path, path: Path, config: Config, data_dir: Path | str | None, display: ComparisonProgress
) -> float:
    """Train a run, unless it is there already, and return the final headline measure of its evaluated model.

    Args:
      out: folder of the comparison.
      path: folder of the run, in `out`.
      config: of the run.
      data_dir: folder of prepared data sets; None: the default of tensorflow-datasets.
      display: shows the progress of the comparison.

    Raises:
      UsageError: if the folder has a run with another configuration, or can't be written.
    """
    headline, name = config.task.headline, str(path.relative_to(out))
    unfinished, aside = (path.with_name(path.name + suffix) for suffix in (".unfinished", ".old"))
    with _writing(out):
        trained = path.exists()
        if trained and (problem := _problem_of(path, config)):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            display.message(f"{name} is trained again; the old run is now {aside.name}: {problem}")
            trained = False
    if not trained:
        shutil.rmtree(unfinished, ignore_errors=True)
        train_and_evaluate(config, unfinished, data_dir=data_dir, stop_if_all_fail=False, watch=display.watcher(name))
        with _writing(out):
            files.sync_tree(unfinished)  # The final name of a cell implies that it is complete.
            unfinished.rename(path)
            files.sync(path.parent)
    value = float(curves([path], headline)["center"][0, -1])
    display.finish(name, config.steps, headline.text(value), trained=not trained)
    return value


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Keep compiled programs for later cells: those of other seeds, and evaluations with other learning rates.

    JAX keeps them on disk, in a temporary folder unless JAX_COMPILATION_CACHE_DIR names one.
    """
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        settings = {
            "jax_compilation_cache_dir": str(folder),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        if before["jax_compilation_cache_dir"] is not None:
            yield
            return
        _configure(settings)
        try:
            yield
        finally:
            _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
    """Change settings of JAX's cache of compiled programs."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # It has been opened, or found to be off, with the earlier settings.


@contextlib.contextmanager
def claimed(out: Path, config: Config, options: Mapping[str, Any], tune: bool) -> Iterator[None]:
    """Create and lock the folder for comparisons with this configuration.

    Raises:
      UsageError: if it is used for something else, another process writes it, or it can't be written.
    """
    fields = config.flat | dict(options)
    shared = {name: value for name, value in fields.items() if name not in _OF_A_CELL and value is not None}
    claim = {"config": json.loads(json.dumps(shared)), "tune": tune}
    path = out / "comparison-config.json"
    with contextlib.ExitStack() as held:
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.lock(out, "name another out folder"))
            if not path.exists():
                if not files.is_empty(out):
                    raise UsageError(f"the folder {out} is not empty and holds no comparison: name another out folder.")
                files.write(path, json.dumps(claim, indent=2) + "\n")
            if _claim_in(path) != claim:
                raise UsageError(f"{out} holds a comparison with another configuration: name another out folder.")
        yield


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"the folder {out} can't be written ({error.strerror}): name another out folder.") from None


def _claim_in(path: Path) -> Any:
    try:
        return files.parse_json(files.read_text(path, MOST_BYTES))
    except ValueError:
        raise UsageError(f"{path} was not written by a comparison: name another out folder.") from None


def _problem_of(run: Path, config: Config) -> str:
    """Say why a trained cell is trained again, such as files that never reached the disk; empty if it is not.

    Raises:
      UsageError: if it is a run with another configuration.
    """
    try:
        found = read_config(run)
    except UsageError as error:
        return str(error)
    if found != config:
        if found.replace(evaluated_model=None) == config.replace(evaluated_model=None):
            # Tuned by an earlier version, which did not choose it, or with fewer seeds.
            return "tuning now chooses another evaluated model."
        raise UsageError(f"{run} holds a run with another configuration: remove it, or name another out folder.")
    try:
        last = int(curves([run], config.task.headline)["step"][0, -1])
    except UsageError as error:
        return str(error)
    return "" if last == config.steps else f"its last evaluation is of step {last} of {config.steps}."
