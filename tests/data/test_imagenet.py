import io

import numpy as np
import pytest
from PIL import Image

from lsgd_jax.data import BatchIndices, Data, Stretch, count, feed_of, hold_out
from lsgd_jax.data.examples import held_and_kept
from lsgd_jax.data.imagenet import ImageNet, _central_crop, _random_crop
from lsgd_jax.data.preparation import encoded_examples
from lsgd_jax.errors import UsageError


def stream(prepared, *, workers=2, batch_size=2, sampling="shards", seed=0, rows=None, held_out=0.0, processes=0):
    """The feed of made-up images."""
    data = Data(*(ImageNet(split, 32, prepared[0]) for split in ("train", "validation")))
    data = hold_out(data, held_out) if held_out else data
    options = {"workers": workers, "batch_size": batch_size, "sampling": sampling, "seed": seed}
    indices = BatchIndices(examples=count(data.train), **options)
    return feed_of(data, indices, range(workers) if rows is None else rows, processes)


def batch(feed, step):
    [found] = feed.batches(step, step + 1)
    return found


def assert_equal(one, other):
    for (x, y), (other_x, other_y) in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def test_batches_are_the_same_whatever_the_processes_and_the_start(prepared):
    expected = [batch(stream(prepared), step) for step in range(7)]
    for x, y in expected:
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((2, 2, 32, 32, 3), np.uint8, (2, 2), np.int32)
    assert_equal(expected, stream(prepared).batches(0, 7))
    assert_equal(expected[3:], stream(prepared, processes=2).batches(3, 7))


def test_an_image_is_cropped_by_the_seed_the_step_the_worker_and_its_place(prepared):
    feed, examples = stream(prepared, seed=5), encoded_examples("imagenet2012", "train", prepared[0])
    x, y = batch(feed, 4)
    for worker, place in np.ndindex(y.shape):
        example = examples[feed._indices(4)[worker, place]]
        crop = _random_crop(example["image"], 32, np.random.default_rng([5, 4, worker, place]))
        np.testing.assert_array_equal(x[worker, place], crop)
        assert y[worker, place] == example["label"]


def test_every_worker_sees_its_own_shard_of_the_epoch(prepared):
    labels = np.stack([y for _, y in stream(prepared).batches(0, 3)])
    indices = stream(prepared)._indices
    assert indices.steps_per_epoch == 3
    np.testing.assert_array_equal(np.bincount(labels.reshape(-1)), [4, 4, 4])
    assert len(np.unique([indices(step) for step in range(3)])) == 12


def test_epochs_and_seeds_differ(prepared):
    (x, _), (later, _) = (batch(stream(prepared), step) for step in (0, 3))
    other, _ = batch(stream(prepared, seed=1), 0)
    assert (x != later).any()
    assert (x != other).any()


def test_rows_are_those_of_all_workers(prepared):
    for rows in ([1], [1, 0], range(1)):
        for step in range(4):
            x, y = batch(stream(prepared), step)
            assert_equal([(x[list(rows)], y[list(rows)])], [batch(stream(prepared, rows=rows), step)])
            assert_equal([(x[list(rows)], y[list(rows)])], [batch(stream(prepared).of_workers(rows), step)])


def test_workers_that_draw_independently(prepared):
    labels = np.stack([y for _, y in stream(prepared, sampling="independent").batches(0, 6)], axis=1)
    for of_worker in labels:
        np.testing.assert_array_equal(np.bincount(of_worker.reshape(-1)), [4, 4, 4])


def test_other_workers_take_what_is_left_of_an_epoch(prepared):
    alone = stream(prepared, workers=1).after([Stretch(steps=1, workers=2, batch_size=2)])
    _, labels = batch(stream(prepared), 0)
    rest = [y for _, y in alone.batches(1, 5)]
    np.testing.assert_array_equal(np.bincount(np.concatenate([labels, *rest]).ravel()), [4, 4, 4])
    assert [alone.epochs(step) for step in (1, 5)] == pytest.approx([1 / 3, 1])


def test_iteration_can_be_broken_off(prepared):
    batches = stream(prepared, processes=1).batches(0, 10**6)
    next(batches)
    batches.close()


def test_the_test_images_come_in_chunks_of_one_size(prepared):
    feed = stream(prepared)
    examples = encoded_examples("imagenet2012", "validation", prepared[0])
    chunks = list(feed.test_chunks(2))
    assert (feed.test_count, len(chunks)) == (5, 3)
    x, y = (np.concatenate(parts) for parts in zip(*(chunk for chunk, _ in chunks), strict=True))
    real = np.concatenate([of_chunk for _, of_chunk in chunks])
    assert (x.shape, x.dtype, y.dtype) == ((6, 32, 32, 3), np.uint8, np.int32)
    assert list(y[real]) == [example["label"] for example in examples]
    assert list(real) == [True] * 5 + [False]
    for one, example in zip(x[real], examples, strict=True):
        np.testing.assert_array_equal(one, _central_crop(example["image"], 32))


def test_held_out_images_are_tested_and_not_trained_on(prepared):
    feed, (held, kept) = stream(prepared, held_out=0.25), held_and_kept(12, 0.25)
    assert (feed.test_count, feed._indices.steps_per_epoch) == (3, 2)
    np.testing.assert_array_equal(np.sort(np.append(held, kept)), range(12))
    examples = encoded_examples("imagenet2012", "train", prepared[0])
    [((x, y), real)] = feed.test_chunks(3)
    assert real.all()
    for i, index in enumerate(held):
        assert y[i] == examples[index]["label"]
        np.testing.assert_array_equal(x[i], _central_crop(examples[index]["image"], 32))
    indices, (_, y) = kept[feed._indices(1)], batch(feed, 1)
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
        ImageNet("validation", 224, tmp_path)
    with pytest.raises(UsageError, match="takes 16 examples, but there are 12"):
        stream(prepared, batch_size=8)
