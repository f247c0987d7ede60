"""The commands `lsgd chaos`, which injects faults into a run, and `lsgd replay`, which checks what came of it."""

from pathlib import Path

import tyro

from lsgd_jax import distributed


def replay(run: tyro.conf.Positional[Path], data_dir: Path | None = None) -> int:
    """Train a run of --asynchronous posted again from its events, and compare all parameters to the bit.

    The exit code is 1 if they differ. They may on another machine, or with other versions of JAX.

    Args:
      run: run folder.
      data_dir: folder of data sets from `lsgd data prepare`; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    from lsgd_jax.simulate import replay

    distributed.simulate_devices(replay.device_count(run))
    replayed = replay.replay(run, data_dir)
    print(replayed)
    return 1 if replayed.differences else 0
