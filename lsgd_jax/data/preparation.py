"""Prepares data sets once and reads them, with tensorflow-datasets (tfds) but without TensorFlow.

    lsgd data prepare cifar10 --data-dir D

Archives in D/downloads/manual are used without network access; others are downloaded, but not ImageNet's and PG-19's:

| data set | archives |
|---|---|
| cifar10 | cifar-10-binary.tar.gz |
| cifar100 | cifar-100-binary.tar.gz |
| mnist | train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz |
| imagenet2012 | ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar |
| tiny_shakespeare | input.txt |
| lm1b | 1-billion-word-language-modeling-benchmark-r13output.tar.gz |
| pg19 | deepmind-gutenberg, a folder |

The last three are texts, which `lsgd_jax.data.text.tokens` then writes as tokens.
"""

import contextlib
import fcntl
import io
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from lsgd_jax.data.builders import BUILDERS
from lsgd_jax.data.folders import data_folder
from lsgd_jax.errors import UsageError


def prepare(name: str, data_dir: Path | str | None = None) -> Path:
    """Prepare a data set unless it is already prepared; if anything fails, nothing is left behind.

    Args:
      name: name in `BUILDERS`.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      The folder of the prepared data set.

    Raises:
      UsageError: if an archive is missing and can't be downloaded, or is not intact, or the folder can't be written.
    """
    data_dir = data_folder(data_dir)
    _remove_left(name, data_dir)
    builder_class, folder = BUILDERS[name], _folder(name, data_dir)
    if is_prepared(name, data_dir):
        _prepared_builder(name, data_dir)  # Raises if it can't be read.
        return folder
    archives = data_dir / "downloads" / "manual"
    _check_archives(builder_class, archives)
    config = tfds.download.DownloadConfig(manual_dir=archives, try_download_gcs=False)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        quiet = contextlib.redirect_stdout(io.StringIO())  # tfds would print the temporary folder as the result.
        with quiet, working_folder(name, data_dir) as work:
            builder = builder_class(data_dir=work, file_format="array_record")
            builder.download_and_prepare(download_dir=work / "downloads", download_config=config)
            folder.parent.mkdir(exist_ok=True)
            Path(builder.data_dir).rename(folder)
    except NonMatchingChecksumError as error:
        file = next(info.filename for url, info in builder_class.url_infos.items() if url in str(error))
        raise UsageError(f"{file} does not match the published checksum: put an intact file into {archives}.") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error, DownloadError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to finalize writing" not in str(error):
            raise  # What array_record's writers raise is of this general kind.
        raise UsageError(f"{name} can't be prepared in {data_dir}: {error}") from None
    return folder


@contextlib.contextmanager
def working_folder(name: str, data_dir: Path) -> Iterator[Path]:
    """A temporary folder for preparing a data set; if this process is killed, the next preparation removes it."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as work,
        Path(work, "lock").open("w") as lock,
    ):
        with contextlib.suppress(OSError):  # Without locks, nothing is removed.
            _lock(lock)
        yield Path(work)


def _remove_left(name: str, data_dir: Path) -> None:
    """Remove temporary folders of preparations that were killed."""
    for work in data_dir.glob(f".{name}-*"):
        with contextlib.suppress(OSError), (work / "lock").open("w") as lock:
            _lock(lock)
            shutil.rmtree(work)


def _lock(file: IO[str]) -> None:
    """Lock a file until it is closed or this process ends; raises OSError if another process holds the lock."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_prepared(name: str, data_dir: Path | str | None = None) -> bool:
    """Return whether the data set is prepared."""
    return (_folder(name, data_folder(data_dir)) / "dataset_info.json").exists()


class Examples(Protocol):
    """Examples with random access, dicts: "image" is the content of a PNG or JPEG file; a text is in UTF-8."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Return several examples, which is faster than one by one."""
        ...


def encoded_examples(name: str, split: str, data_dir: Path | str | None = None) -> Examples:
    """Return the encoded examples of a prepared data set, always in the same order.

    Args:
      name: name of the data set.
      split: "train", or "test" ("validation" for imagenet2012).
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      UsageError: if the data set is not prepared, or in a format that only TensorFlow can read.
    """
    builder = _prepared_builder(name, data_folder(data_dir))
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    return builder.as_data_source(split, decoders=decoders)


def _prepared_builder(name: str, data_dir: Path) -> Any:
    if not is_prepared(name, data_dir):
        raise UsageError(f"{name} is not prepared in {data_dir}: run lsgd data prepare {name} with this data_dir.")
    builder = tfds.builder_cls(name)(data_dir=data_dir)
    if builder.info.file_format.value != "array_record":
        raise UsageError(
            f"{builder.data_dir} is in the format {builder.info.file_format.value}, which needs TensorFlow: remove it,"
            f" or name another data_dir, and run lsgd data prepare {name}."
        )
    return builder


def _folder(name: str, data_dir: Path) -> Path:
    return data_dir / name / str(BUILDERS[name].VERSION)


def _check_archives(builder_class: Any, archives: Path) -> None:
    """Check that all archives exist or can be downloaded: tfds itself would retry for minutes."""
    missing = {url: info for url, info in builder_class.url_infos.items() if not (archives / info.filename).exists()}
    files = ", ".join(info.filename for info in missing.values())
    if missing and builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise UsageError(f"put {files} into {archives}; {builder_class.obtained_by}.")
    for url in missing:
        try:
            with requests.get(url, stream=True, timeout=5) as response:
                response.raise_for_status()
        except requests.RequestException:
            server, folder = urlsplit(url).hostname, url.rpartition("/")[0]
            raise UsageError(f"{server} can't be reached: put {files} from {folder} into {archives}.") from None
