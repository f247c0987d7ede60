import fcntl
import io
import resource
import socket
import time

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lsgd_jax.data import builders, preparation
from lsgd_jax.errors import UsageError
from tests.data import archives
from tests.reliability import commands


def with_made_up_archive(folder, *arguments):
    """A command that takes the archive in a folder for the published one."""
    archives.accept(pytest.MonkeyPatch(), "cifar10", folder)
    return commands.lsgd(*arguments)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_stock_tensorflow_datasets_reads_what_was_prepared(name, prepared):
    data_dir, truth = prepared
    for split, (x, y) in zip(("train", "test"), truth[name], strict=True):
        source = tfds.data_source(name, split=split, data_dir=data_dir, builder_kwargs={"file_format": "array_record"})
        assert len(source) == len(y)
        order = {row.tobytes(): i for i, row in enumerate(x)}
        found = [order[example["image"].tobytes()] for example in source]
        assert sorted(found) == list(range(len(y)))
        assert [example["label"] for example in source] == list(y[found])
        if name != "mnist":
            assert [example["id"].decode() for example in source] == [f"{split}_{i:05d}" for i in found]
        if name == "cifar100":
            assert [example["coarse_label"] for example in source] == list(y[found] // 5)


def test_the_names_of_the_labels(prepared):
    data_dir, _ = prepared
    assert tfds.builder("cifar10", data_dir=data_dir).info.features["label"].names[3] == "class_3"
    assert tfds.builder("cifar100", data_dir=data_dir).info.features["coarse_label"].names[19] == "coarse_19"


def test_stock_tensorflow_datasets_reads_imagenet(prepared):
    data_dir, truth = prepared
    for split in ("train", "validation"):
        kwargs = {"file_format": "array_record"}
        source = tfds.data_source("imagenet2012", split=split, data_dir=data_dir, builder_kwargs=kwargs)
        names = source.dataset_info.features["label"].names
        labels = {example["file_name"].decode(): names[example["label"]] for example in source}
        assert labels == truth["imagenet2012"][split]
        assert all(example["image"].shape[2] == 3 for example in source)


def test_preparing_twice_changes_nothing(data_dir, monkeypatch, capsys):
    archives.make_cifar10(data_dir / "downloads" / "manual")
    archives.accept(monkeypatch, "cifar10", data_dir / "downloads" / "manual")
    folder = preparation.prepare("cifar10", data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert preparation.prepare("cifar10", data_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {path.name for path in data_dir.iterdir()} == {"cifar10", "downloads"}
    assert capsys.readouterr().out == ""


def test_what_a_killed_preparation_has_left_is_removed(data_dir, monkeypatch):
    """Not what another process is at."""
    archives.make_cifar10(data_dir / "downloads" / "manual")
    archives.accept(monkeypatch, "cifar10", data_dir / "downloads" / "manual")
    left, others = data_dir / ".cifar10-left", data_dir / ".cifar10-others"
    for folder in (left, others):
        folder.mkdir()
        (folder / "part").touch()
    with (others / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        preparation.prepare("cifar10", data_dir)
        assert not left.exists()
        assert (others / "part").exists()
    preparation.prepare("cifar10", data_dir)  # Which has nothing else to do.
    assert {path.name for path in data_dir.iterdir()} == {"cifar10", "downloads"}


def test_a_preparation_under_way_is_not_removed(data_dir, monkeypatch):
    archives.make_cifar10(data_dir / "downloads" / "manual")
    archives.accept(monkeypatch, "cifar10", data_dir / "downloads" / "manual")
    download = builders.Cifar.download_and_prepare

    def meanwhile(builder, *arguments, **options):
        preparation._remove_left("cifar10", data_dir)
        download(builder, *arguments, **options)

    monkeypatch.setattr(builders.Cifar, "download_and_prepare", meanwhile)
    assert preparation.prepare("cifar10", data_dir).is_dir()


def test_a_wrong_checksum_is_one_sentence_and_nothing_is_left(data_dir):
    archives.make_cifar10(data_dir / "downloads" / "manual")
    before = files(data_dir)
    with pytest.raises(
        UsageError, match=r"^cifar-10-binary.tar.gz does not match the published checksum: .* into .*manual\.$"
    ):
        preparation.prepare("cifar10", data_dir)
    assert files(data_dir) == before


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_truncated_archive_is_one_sentence_and_nothing_is_left(name, data_dir, monkeypatch):
    folder = data_dir / "downloads" / "manual"
    {"cifar10": archives.make_cifar10, "mnist": archives.make_mnist}[name](folder)
    archives.accept(monkeypatch, name, folder)
    victim = min(folder.iterdir())
    victim.write_bytes(victim.read_bytes()[:-100])
    before = files(data_dir)
    with pytest.raises(UsageError, match=f"^{victim.name} does not match the published checksum"):
        preparation.prepare(name, data_dir)
    archives.accept(monkeypatch, name, folder)  # Published like that.
    with pytest.raises(UsageError, match=f"^{name} can't be prepared in .*ended before"):
        preparation.prepare(name, data_dir)
    assert files(data_dir) == before


@pytest.mark.usefixtures("offline")
def test_missing_archives_without_network_are_named(data_dir):
    folder = data_dir / "downloads" / "manual"
    archives.make_mnist(folder)
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    before = files(data_dir)
    with pytest.raises(
        UsageError, match=r"^storage\S+ can't be reached: put t10k-images-idx3-ubyte.gz from http\S+ into /"
    ):
        preparation.prepare("mnist", data_dir)
    with pytest.raises(
        UsageError, match=r"^put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar into .*/image-net.org"
    ):
        preparation.prepare("imagenet2012", data_dir)
    assert files(data_dir) == before


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    archives.make_cifar10(folder)
    archives.accept(monkeypatch, "cifar10", folder)
    (tmp_path / "cifar10").touch()
    with pytest.raises(UsageError, match=r"cifar10 can't be prepared in .*File exists"):
        preparation.prepare("cifar10", tmp_path)


def test_a_full_disk_is_one_sentence_and_nothing_is_left(data_dir, monkeypatch):
    """A limit on files' sizes, which only the examples come to."""
    archives.make_cifar10(data_dir / "downloads" / "manual")
    archives.accept(monkeypatch, "cifar10", data_dir / "downloads" / "manual")
    before, (soft, hard) = files(data_dir), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))
    try:
        with pytest.raises(UsageError, match=r"^cifar10 can't be prepared in .*: .* File too large; .*$"):
            preparation.prepare("cifar10", data_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(data_dir) == before
    assert preparation.prepare("cifar10", data_dir).is_dir()


def test_a_format_that_needs_tensorflow(prepared, tmp_path):
    data_dir, _ = prepared
    for path in (data_dir / "mnist" / "3.0.1").glob("*.json"):
        target = tmp_path / "mnist" / "3.0.1" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace("array_record", "tfrecord"))
    for use in (preparation.prepare, lambda name, folder: preparation.encoded_examples(name, "train", folder)):
        with pytest.raises(UsageError, match="is in the format tfrecord, which needs TensorFlow: remove it"):
            use("mnist", tmp_path)


def test_the_few_images_of_imagenet_that_are_not_jpeg_become_it(tmp_path, monkeypatch):
    data_dir, folder = tmp_path, tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    archives.make_imagenet(folder, odd=True)
    archives.accept(monkeypatch, "imagenet2012", folder)
    preparation.prepare("imagenet2012", data_dir)
    for example in preparation.encoded_examples("imagenet2012", "train", data_dir):
        image = Image.open(io.BytesIO(example["image"]))
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_the_command_without_archive_and_network_is_quick(tmp_path):
    proxy = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}  # Nobody listens there.
    # tensorflow-datasets by itself tries again for 204 seconds.
    begun = time.monotonic()
    code, [told] = commands.done("data", "prepare", "cifar10", "--data-dir", "new", cwd=tmp_path, **proxy)
    assert time.monotonic() < begun + 150
    assert code == 2
    assert (tmp_path / "output.out").read_text() == ""
    assert told.startswith("lsgd: www.cs.toronto.edu can't be reached: put cifar-10-binary.tar.gz from https://")
    assert told.endswith("into new/downloads/manual.")
    assert files(tmp_path) == ["output.err", "output.out"]


def test_the_command(data_dir):
    folder = data_dir / "downloads" / "manual"
    archives.make_cifar10(folder)
    command = ["data", "prepare", "cifar10", "--data-dir", str(data_dir)]
    for already in ("", "already "):
        assert commands.called(with_made_up_archive, folder, *command, cwd=data_dir) == (0, [])
        printed = (data_dir / "output.out").read_text()
        assert printed == f"cifar10 is {already}prepared in {data_dir}/cifar10/3.0.2\n"
    archive = folder / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    (data_dir / "cifar10").rename(data_dir / "away")
    sentence = f"{archive.name} does not match the published checksum: put an intact file into {folder}."
    assert commands.done(*command, cwd=data_dir) == (2, [f"lsgd: {sentence}"])
    assert not (data_dir / "cifar10").exists()
