"""Prepares data sets once and reads them, with tensorflow-datasets (tfds) but without TensorFlow.

    lsgd data prepare cifar10 --data-dir D

Archives in D/downloads/manual are used without network access; all others are downloaded, except ImageNet's:

| data set | archives |
|---|---|
| cifar10 | cifar-10-binary.tar.gz |
| cifar100 | cifar-100-binary.tar.gz |
| mnist | train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz |
| imagenet2012 | ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar |

The builders are those of tfds, with its URLs, checksums, features and order of examples. Reading archives and encoding
images, for which tfds uses TensorFlow, is done here with the standard library and Pillow.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import io
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol
from urllib.parse import urlsplit

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.image_classification import cifar, mnist

from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError


def prepare(name: str, data_dir: Path | str | None = None) -> Path:
    """Prepare a data set unless it is already prepared; if anything fails, nothing is left behind.

    Args:
      name: cifar10, cifar100, mnist or imagenet2012.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      The folder of the prepared data set.

    Raises:
      UsageError: if an archive is missing and can't be downloaded, or is not intact, or the folder can't be written.
    """
    data_dir = _data_dir(data_dir)
    _remove_left(name, data_dir)
    builder_class, folder = _BUILDERS[name], _folder(name, data_dir)
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
        with (
            quiet,
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as work,
            Path(work, "lock").open("w") as lock,
        ):
            with contextlib.suppress(OSError):  # Without locks, nothing is removed.
                _lock(lock)
            builder = builder_class(data_dir=work, file_format="array_record")
            builder.download_and_prepare(download_dir=Path(work, "downloads"), download_config=config)
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
    return (_folder(name, _data_dir(data_dir)) / "dataset_info.json").exists()


class Examples(Protocol):
    """Examples with random access: "image" is the content of a PNG or JPEG file, "label" an int."""

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
    builder = _prepared_builder(name, _data_dir(data_dir))
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


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


def _data_dir(data_dir: Path | str | None) -> Path:
    """Return the folder, by default that of tfds."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return check_path("data_dir", folder).expanduser()


def _folder(name: str, data_dir: Path) -> Path:
    return data_dir / name / str(_BUILDERS[name].VERSION)


def _check_archives(builder_class: Any, archives: Path) -> None:
    """Check that all archives exist or can be downloaded: tfds itself would retry for minutes."""
    missing = {url: info for url, info in builder_class.url_infos.items() if not (archives / info.filename).exists()}
    files = ", ".join(info.filename for info in missing.values())
    if missing and builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise UsageError(
            f"put {files} into {archives}; registered users get them from https://image-net.org/download-images."
        )
    for url in missing:
        try:
            with requests.get(url, stream=True, timeout=5) as response:
                response.raise_for_status()
        except requests.RequestException:
            server, folder = urlsplit(url).hostname, url.rpartition("/")[0]
            raise UsageError(f"{server} can't be reached: put {files} from {folder} into {archives}.") from None


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the files in a tar archive with their names; read each before the next."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:  # None for a folder.
                yield member.name, file


with registered.skip_registration():  # The names are taken by tfds' own builders.

    class _Cifar(tfds.core.GeneratorBasedBuilder):
        """Builder shared by CIFAR-10 and CIFAR-100."""

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            source = self._cifar_info
            archive = downloads.download(source.url)
            files = {name.removeprefix(source.prefix): file.read() for name, file in _members(archive)}
            for label, file in zip(source.label_keys, source.label_files, strict=True):
                self.info.features[label].names = files[file].decode().split()
            parts = {"train": source.train_files, "test": source.test_files}
            records = {split: b"".join(files[file] for file in part) for split, part in parts.items()}
            return {split: self._generate_examples(split, records[split]) for split in parts}

        def _generate_examples(self, split: str, records: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
            """Decode records: labels of one byte each, then an image, channels first."""
            labels = self._cifar_info.label_keys
            for i, record in enumerate(np.frombuffer(records, np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)):
                pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
                image = Image.fromarray(np.ascontiguousarray(pixels))
                yield i, {"id": f"{split}_{i:05d}", "image": image, **dict(zip(labels, record, strict=False))}

    class _Cifar10(_Cifar, cifar.Cifar10):
        name = "cifar10"
        url_infos = cifar.Cifar10.url_infos

    class _Cifar100(_Cifar, cifar.Cifar100):
        name = "cifar100"
        url_infos = cifar.Cifar100.url_infos

    class _MNIST(mnist.MNIST):
        name = "mnist"
        url_infos = mnist.MNIST.url_infos

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            paths = downloads.download({info.filename: url for url, info in self.url_infos.items()})
            kinds = "images-idx3", "labels-idx1"
            parts = {"train": "train", "test": "t10k"}
            files = {split: [paths[f"{part}-{kind}-ubyte.gz"] for kind in kinds] for split, part in parts.items()}
            return {split: self._generate_examples(*files[split]) for split in parts}

        def _generate_examples(self, images: Path, labels: Path) -> Iterator[tuple[int, dict[str, Any]]]:
            """Decode pixels and labels, which follow headers of 16 and 8 bytes."""
            pixels, classes = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in (images, labels))
            for i, (image, label) in enumerate(zip(pixels[16:].reshape(-1, 28, 28), classes[8:], strict=True)):
                yield i, {"image": Image.fromarray(image), "label": label}

    class _ImageNet(imagenet2012_dataset_builder.Builder):
        name = "imagenet2012"
        pkg_dir_path = tfds.core.tfds_path("datasets/imagenet2012")
        url_infos: ClassVar = {
            url: dataclasses.replace(info, filename=url.rpartition("/")[2])
            for url, info in imagenet2012_dataset_builder.Builder.url_infos.items()
        }

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            train, validation = downloads.download(sorted(self.url_infos))
            labels = (self.pkg_dir_path / "validation_labels.txt").read_text().split()
            label_of = dict(zip(sorted(name for name, _ in _members(validation)), labels, strict=False))
            return {
                "train": self._generate_examples(_members(train)),
                "validation": self._generate_examples(_members(validation), label_of),
            }

        def _fix_image(self, name: str, image: IO[bytes]) -> IO[bytes]:
            """Convert the few images that are not RGB or grayscale JPEG."""
            content = image.read()
            opened = Image.open(io.BytesIO(content))  # Reads only the header.
            if opened.format == "JPEG" and opened.mode != "CMYK":
                return io.BytesIO(content)
            converted = io.BytesIO()
            opened.convert("RGB").save(converted, "JPEG", quality=100)
            return io.BytesIO(converted.getvalue())


_BUILDERS = {builder.name: builder for builder in (_Cifar10, _Cifar100, _MNIST, _ImageNet)}
