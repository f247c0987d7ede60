"""Builders of data sets: those of tensorflow-datasets (tfds), reading archives without TensorFlow.

They have tfds' URLs, checksums, features and order of examples. Archives are read and images encoded, for which tfds
uses TensorFlow, with the standard library and Pillow.
"""

import csv
import dataclasses
import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder
from tensorflow_datasets.datasets.pg19 import pg19_dataset_builder
from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder
from tensorflow_datasets.image_classification import cifar, mnist

from lsgd_jax.errors import UsageError


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the files in a tar archive with their names; read each before the next."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:  # None for a folder.
                yield member.name, file


with registered.skip_registration():  # The names are taken by tfds' own builders.

    class Cifar(tfds.core.GeneratorBasedBuilder):
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

    class _Cifar10(Cifar, cifar.Cifar10):
        name = "cifar10"
        url_infos = cifar.Cifar10.url_infos

    class _Cifar100(Cifar, cifar.Cifar100):
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
        obtained_by = "registered users get them from https://image-net.org/download-images"

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

    class _TinyShakespeare(tiny_shakespeare_dataset_builder.Builder):
        name = "tiny_shakespeare"
        pkg_dir_path = tfds.core.tfds_path("datasets/tiny_shakespeare")
        url_infos = tiny_shakespeare_dataset_builder.Builder.url_infos
        text_feature = "text"

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            [url] = self.url_infos
            text = downloads.download(url).read_text("utf-8")
            train = int(0.9 * len(text))
            validation = train + int(0.5 * (len(text) - train))
            parts = {"train": text[:train], "validation": text[train:validation], "test": text[validation:]}
            return {split: self._generate_examples(split, part) for split, part in parts.items()}

    class _LM1B(lm1b_dataset_builder.Builder):
        name = "lm1b"
        pkg_dir_path = tfds.core.tfds_path("datasets/lm1b")
        url_infos = lm1b_dataset_builder.Builder.url_infos
        text_feature = "text"

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            [url] = self.url_infos
            archive = downloads.download(url)
            parts = {"train": "training-monolingual", "test": "heldout-monolingual"}
            return {split: self._generate_examples(archive, part) for split, part in parts.items()}

        def _generate_examples(self, archive: Path, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
            """Yield the sentences, one per line."""
            for path, file in _members(archive):
                *_, folder, name = Path("", path).parts
                if folder == f"{part}.tokenized.shuffled" and name.startswith("news.en"):
                    for i, line in enumerate(file):
                        yield f"{name}_{i}", {"text": line.decode().strip()}

    class _PG19(pg19_dataset_builder.Builder):
        name = "pg19"
        pkg_dir_path = tfds.core.tfds_path("datasets/pg19")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "a folder of a Google Cloud bucket"
        # The bucket as an archive; nothing is downloaded from it, so that it has no checksum.
        url_infos: ClassVar = {"gs://deepmind-gutenberg": UrlInfo(0, "", "deepmind-gutenberg")}
        obtained_by = "gsutil -m cp -r gs://deepmind-gutenberg . copies it"
        text_feature = "book_text"

        def _split_generators(self, downloads: Any) -> dict[str, Any]:
            folder = Path(downloads.manual_dir, "deepmind-gutenberg")  # Not a path of tfds, which knows no newlines.
            with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
                books = {name: about for name, *about in csv.reader(file)}
            return {split: self._generate_examples(folder / split, books) for split in ("train", "validation", "test")}

        def _generate_examples(self, folder: Path, books: dict[str, list[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
            """Yield the books."""
            for path in sorted(folder.glob("*.txt")):
                if len(books.get(path.stem, ())) < 3:
                    raise UsageError(f"{folder.parent}/metadata.csv has no title, date and link of {path}.")
                title, date, link = books[path.stem][:3]
                about = {"book_title": title, "publication_date": date, "book_link": link}
                yield int(path.stem), {"book_text": path.read_text("utf-8").strip(), "book_id": path.stem, **about}


_ALL = (_Cifar10, _Cifar100, _MNIST, _ImageNet, _TinyShakespeare, _LM1B, _PG19)
BUILDERS = {builder.name: builder for builder in _ALL}
"""Builders by data set name. `obtained_by` says how to get archives that can't be downloaded, and `text_feature` is the
name of the text in the examples of data sets of texts."""
TEXTS = tuple(name for name, builder in BUILDERS.items() if hasattr(builder, "text_feature"))
"""Names of the data sets of texts."""
