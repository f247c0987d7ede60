import io

import numpy as np
import pytest
from PIL import Image

from lsgd_jax.data import Streamed, Stretch
from lsgd_jax.data.imagenet import ImageNetStream, ImageNetTest, _central_crop, _random_crop
from lsgd_jax.data.preparation import encoded_examples
from lsgd_jax.errors import UsageError


def stream(prepared, **options):
    return ImageNetStream(prepared[0], **{"workers": 2, "batch_size": 2, "seed": 0, "image_size": 32} | options)


def assert_equal(one, other):
    for (x, y), (other_x, other_y) in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def test_batches_are_the_same_whatever_the_processes_and_the_start(prepared):
    expected = [stream(prepared).batch(step) for step in range(7)]
    for x, y in expected:
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((2, 2, 32, 32, 3), np.uint8, (2, 2), np.int32)
    assert_equal(expected, stream(prepared).batches(0, 7))
    assert_equal(expected[3:], stream(prepared).batches(3, 7, processes=2))


def test_every_worker_sees_its_own_shard_of_the_epoch(prepared):
    labels = np.stack([y for _, y in stream(prepared).batches(0, 3)])
    assert stream(prepared).steps_per_epoch == 3
    np.testing.assert_array_equal(np.bincount(labels.reshape(-1)), [4, 4, 4])
    indices = stream(prepared)._indices
    assert len(np.unique([indices(step) for step in range(3)])) == 12


def test_epochs_and_seeds_differ(prepared):
    (x, _), (later, _) = (stream(prepared).batch(step) for step in (0, 3))
    other, _ = stream(prepared, seed=1).batch(0)
    assert (x != later).any()
    assert (x != other).any()


def test_rows_are_those_of_all_workers(prepared):
    for rows in ([1], [1, 0], range(1)):
        for step in range(4):
            x, y = stream(prepared).batch(step)
            assert_equal([(x[list(rows)], y[list(rows)])], [stream(prepared, rows=rows).batch(step)])


def test_workers_that_draw_independently(prepared):
    labels = np.stack([y for _, y in stream(prepared, sampling="independent").batches(0, 6)], axis=1)
    for of_worker in labels:
        np.testing.assert_array_equal(np.bincount(of_worker.reshape(-1)), [4, 4, 4])


def test_other_workers_take_what_is_left_of_an_epoch(prepared):
    alone = Streamed(
        prepared[0], workers=1, batch_size=2, sampling="shards", seed=0, held_out=0.0, image_size=32, processes=0
    )
    alone = alone.after([Stretch(steps=1, workers=2, batch_size=2)])
    _, labels = stream(prepared).batch(0)
    rest = [y for _, y in alone.batches(1, 5)]
    np.testing.assert_array_equal(np.bincount(np.concatenate([labels, *rest]).ravel()), [4, 4, 4])
    assert [alone.epochs(step) for step in (1, 5)] == pytest.approx([1 / 3, 1])


def test_iteration_can_be_broken_off(prepared):
    batches = stream(prepared).batches(0, 10**6, processes=1)
    next(batches)
    batches.close()


def test_the_test_images_come_in_chunks_of_one_size(prepared):
    test = ImageNetTest(prepared[0], image_size=32)
    examples = encoded_examples("imagenet2012", "validation", prepared[0])
    chunks = list(test.chunks(2))
    assert (test.examples, len(chunks)) == (5, 3)
    x, y = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    assert (x.shape, x.dtype, y.dtype) == ((6, 32, 32, 3), np.uint8, np.int32)
    assert list(y) == [example["label"] for example in examples] + [-1]
    for one, example in zip(x, examples, strict=False):
        np.testing.assert_array_equal(one, _central_crop(example["image"], 32))


def test_held_out_images_are_tested_and_not_trained_on(prepared):
    test, training = ImageNetTest(prepared[0], held_out=0.25, image_size=32), stream(prepared, held_out=0.25)
    assert (test.examples, training.steps_per_epoch) == (3, 2)
    np.testing.assert_array_equal(np.sort(np.append(test._indices, training._kept)), range(12))
    examples = encoded_examples("imagenet2012", "train", prepared[0])
    ((x, y),) = test.chunks(3)
    for i, index in enumerate(test._indices):
        assert y[i] == examples[index]["label"]
        np.testing.assert_array_equal(x[i], _central_crop(examples[index]["image"], 32))
    indices, (_, y) = training._kept[training._indices(1)], training.batch(1)
    np.testing.assert_array_equal(y, [[examples[index]["label"] for index in row] for row in indices])


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_the_central_crop_is_that_of_resizing_and_cropping():
    height, width = 256, 300
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_central_crop(png(image), 224), image[16:240, 38:262])


def test_random_crops_are_parts_of_the_image():
    rows, columns = np.meshgrid(np.arange(120), np.arange(200), indexing="ij")
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)  # Every pixel tells where it is.
    areas, mirrored = [], 0
    for seed in range(200):
        crop = _random_crop(png(image), 16, np.random.default_rng(seed)).astype(int)
        assert crop.shape == (16, 16, 3)
        (top, left), (bottom, right) = crop[0, 0, :2], crop[-1, -1, :2]
        mirrored += left > right
        height, width = (bottom - top) * 16 / 15, abs(right - left) * 16 / 15
        areas.append(height * width / (120 * 200))
        assert 0.7 < width / height < 1.4
    assert 0.06 < min(areas) < 0.15
    assert 0.6 < max(areas) < 1.05
    assert 70 < mirrored < 130


def test_an_image_that_no_random_part_fits_is_cropped_to_its_centre():
    image = np.random.default_rng(0).integers(0, 256, (1, 200, 3), dtype=np.uint8)
    assert _random_crop(png(image), 16, np.random.default_rng(0)).shape == (16, 16, 3)


def test_images_that_are_grey():
    assert _central_crop(png(np.zeros((40, 50), np.uint8)), 32).shape == (32, 32, 3)


def test_bad_input_is_one_sentence(prepared, tmp_path):
    with pytest.raises(UsageError, match="run lsgd data prepare imagenet2012"):
        ImageNetTest(tmp_path)
    with pytest.raises(UsageError, match="takes 16 examples, but there are 12"):
        stream(prepared, batch_size=8)
