"""Small archives of made-up images and texts in the formats in which the real data sets are published.

Training images of a class share a colour, so that networks can learn them.
"""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def make_cifar10(folder: Path, train: int = 50, test: int = 20, seed: int = 0) -> tuple:
    """Write cifar-10-binary.tar.gz; returns the images and labels, of training and of test, in the archive's order."""
    parts = _images(train, (32, 32, 3), 10, seed), _images(test, (32, 32, 3), 10, seed + 1)
    (train_x, train_y), (test_x, test_y) = parts
    files = {"batches.meta.txt": "".join(f"class_{i}\n" for i in range(10)).encode() + b"\n"}
    for i, rows in enumerate(np.array_split(np.arange(train), 5), 1):
        files[f"data_batch_{i}.bin"] = _records(train_x[rows], train_y[rows, None])
    files["test_batch.bin"] = _records(test_x, test_y[:, None])
    _tar(folder / "cifar-10-binary.tar.gz", files, prefix="cifar-10-batches-bin/")
    return parts


def make_cifar100(folder: Path, train: int = 100, test: int = 100, seed: int = 0) -> tuple:
    """Write cifar-100-binary.tar.gz; returns the images and fine labels, of training and of test."""
    parts = _images(train, (32, 32, 3), 100, seed), _images(test, (32, 32, 3), 100, seed + 1)
    files = {}
    for kind, count in (("coarse", 20), ("fine", 100)):
        files[f"{kind}_label_names.txt"] = "".join(f"{kind}_{i}\n" for i in range(count)).encode()
    for name, (x, y) in zip(("train", "test"), parts, strict=True):
        files[f"{name}.bin"] = _records(x, np.stack([y // 5, y], axis=1))
    _tar(folder / "cifar-100-binary.tar.gz", files, prefix="cifar-100-binary/")
    return parts


def make_mnist(folder: Path, train: int = 50, test: int = 20, seed: int = 0) -> tuple:
    """Write MNIST's four files; returns the images and labels, of training and of test."""
    parts = _images(train, (28, 28, 1), 10, seed), _images(test, (28, 28, 1), 10, seed + 1)
    for name, (x, y) in zip(("train", "t10k"), parts, strict=True):
        for kind, values in (("images-idx3", x[..., 0]), ("labels-idx1", y)):
            header = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            content = gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    return parts


def make_imagenet(
    folder: Path, classes: int = 3, per_class: int = 4, validation: int = 5, seed: int = 0, *, odd: bool = False
) -> dict:
    """Write ILSVRC2012_img_train.tar, a tar of a tar a class, and ILSVRC2012_img_val.tar, of JPEGs of many sizes.

    Args:
      folder: to write to.
      classes: with training images.
      per_class: training images.
      validation: images.
      seed: of all.
      odd: whether the first two training images of every class are a PNG and a CMYK JPEG, as a few of the real ones.

    Returns:
      For "train" and "validation", the class of every image, by the name of its file.
    """
    rng = np.random.default_rng(seed)
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    synsets = (lists / "labels.txt").read_text().split()[:classes]
    tars, labels = {}, {}
    for synset in synsets:
        images = {f"{synset}_{i}.JPEG": jpeg(rng) for i in range(per_class)}
        if odd:
            first, second, *_ = images
            images[first] = _converted(images[first], "RGBA", "PNG")
            images[second] = _converted(images[second], "CMYK", "JPEG")
        tars[f"{synset}.tar"] = _tar(None, images)
        labels |= dict.fromkeys(images, synset)
    _tar(folder / "ILSVRC2012_img_train.tar", tars)
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(validation)]
    _tar(folder / "ILSVRC2012_img_val.tar", {name: jpeg(rng) for name in names[::-1]})
    published = (lists / "validation_labels.txt").read_text().split()
    return {"train": labels, "validation": dict(zip(names, published, strict=False))}


def make_tiny_shakespeare(folder: Path, characters: int = 400, seed: int = 0) -> dict[str, list[str]]:
    """Write input.txt; returns the documents, one per split."""
    text = _text(np.random.default_rng(seed), characters)
    (folder / "input.txt").write_text(text, "utf-8")
    train, rest = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    return {"train": [train], "test": [rest[int(0.5 * len(rest)) :]]}


def make_lm1b(folder: Path, train: int = 30, test: int = 8, seed: int = 0) -> dict[str, list[str]]:
    """Write the archive of the One Billion Word Benchmark; returns the sentences of each split."""
    rng = np.random.default_rng(seed)
    splits = {"train": [_text(rng, 60) for _ in range(train)], "test": [_text(rng, 60) for _ in range(test)]}
    shards = {
        "training-monolingual.tokenized.shuffled/news.en-0000{}-of-00100": splits["train"],
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050": splits["test"],
    }
    files = {"README": b"Not a sentence.\n"}
    for name, sentences in shards.items():
        for i in range(2):
            files[name.format(i)] = "".join(f"{sentence}\n" for sentence in sentences[i::2]).encode()
    name = "1-billion-word-language-modeling-benchmark-r13output"
    _tar(folder / f"{name}.tar.gz", files, prefix=f"{name}/")
    return splits


def make_pg19(folder: Path, seed: int = 0) -> dict[str, list[str]]:
    """Write the folder of PG-19's books; returns the books of each split."""
    rng, books, rows = np.random.default_rng(seed), {}, []
    for split, numbers in (("train", (10, 11, 123)), ("validation", (20,)), ("test", (30, 31))):
        (folder / "deepmind-gutenberg" / split).mkdir(parents=True)
        books[split] = [_text(rng, 300) for _ in numbers]
        for number, text in zip(numbers, books[split], strict=True):
            (folder / "deepmind-gutenberg" / split / f"{number}.txt").write_text(f"\n{text}\n\n", "utf-8")
            rows.append(f"{number},Book {number},18{number % 100},http://www.gutenberg.org/ebooks/{number}\n")
    (folder / "deepmind-gutenberg" / "metadata.csv").write_text("".join(rows))
    return books


def _text(rng: np.random.Generator, characters: int) -> str:
    """Words of a small vocabulary, some in other scripts."""
    words = rng.choice(["the", "cat", "Größe", "sat", "文字", "on", "a", "mat"], characters // 3)
    return "".join(word + (" " if rng.random() < 0.9 else " / ") for word in words)[:characters].strip()


def jpeg(rng: np.random.Generator, least: int = 40, most: int = 90) -> bytes:
    """A JPEG file of a smooth image whose sides are between these."""
    height, width = (int(side) for side in rng.integers(least, most + 1, 2))
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def accept(monkeypatch, name: str, folder: Path) -> None:
    """Have a data set's builder expect the archives that are in the folder in place of the published ones."""
    from lsgd_jax.data import builders

    url_infos = builders.BUILDERS[name].url_infos
    for url, info in url_infos.items():
        own = tfds.core.download.checksums.compute_url_info(folder / info.filename)
        monkeypatch.setitem(url_infos, url, own)


def _converted(encoded: bytes, mode: str, image_format: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert(mode).save(file, image_format)
    return file.getvalue()


def _images(count: int, shape: tuple, classes: int, seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(count) % classes).astype(np.int32)
    colours = np.random.default_rng(99).integers(0, 200, (classes, 1, 1, shape[-1]))
    return (colours[y] + rng.integers(0, 56, (count, *shape))).astype(np.uint8), y


def _records(x: np.ndarray, labels: np.ndarray) -> bytes:
    pixels = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return np.concatenate([labels.astype(np.uint8), pixels], axis=1).tobytes()


def _tar(path: Path | None, files: dict[str, bytes], prefix: str = "") -> bytes:
    """A tar archive, compressed if its name says so, written to the path if there is one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    if path is not None:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return content
