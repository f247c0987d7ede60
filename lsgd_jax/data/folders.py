"""Where prepared data sets are."""

import os
from pathlib import Path

from lsgd_jax.checks import check_path


def data_folder(data_dir: Path | str | None) -> Path:
    """Return the folder of prepared data sets: this one, or by default that of tensorflow-datasets.

    Raises:
      UsageError: if no file can have such a name.
    """
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return check_path("data_dir", folder).expanduser()
