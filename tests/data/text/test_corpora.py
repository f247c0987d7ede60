"""Texts as rows of tokens, read in windows."""

import json
import pickle
import zlib

import numpy as np
import pytest

from lsgd_jax.data.text import Windows, load
from lsgd_jax.errors import UsageError


def test_windows_predict_each_token_once(tmp_path):
    np.save(tmp_path / "row.npy", np.arange(1, 31, dtype=np.uint16))
    tokens = np.load(tmp_path / "row.npy", mmap_mode="r")
    windows = Windows(tokens, context=4)
    assert len(windows) == 7
    found = windows.read(np.arange(7))
    assert (type(found), found.dtype, found.shape) == (np.ndarray, np.uint16, (7, 5))
    np.testing.assert_array_equal(found[:, 1:].reshape(-1), np.arange(2, 30))
    np.testing.assert_array_equal(found[:, :-1].reshape(-1), np.arange(1, 29))
    np.testing.assert_array_equal(windows.read(np.array([6, 0, 6])), found[[6, 0, 6]])
    pickled = pickle.dumps(windows)
    assert len(pickled) < 500  # The name of the file, which may be large.
    np.testing.assert_array_equal(pickle.loads(pickled).read(np.arange(7)), found)
    in_memory = pickle.loads(pickle.dumps(Windows(np.arange(9), context=4)))
    np.testing.assert_array_equal(in_memory.read(np.array([1])), [[4, 5, 6, 7, 8]])


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_what_fills_no_window_is_left_out(tokens, windows):
    assert len(Windows(np.zeros(tokens, np.uint8), context=4)) == windows


def test_the_tragedies():
    train, test, vocabulary = load("tragedies")
    assert len(train) + len(test) == 951_667
    assert bytes(train[:8]) == b"Hamlet\n\n"
    assert bytes(test[:22]) == b"Timon of Athens\n\nACT I"
    assert max(train.max(), test.max()) < vocabulary == 128
    assert zlib.crc32(bytes(train) + bytes(test)) == 2658960257


def test_a_text_of_one_s_own_ends_with_the_test_part(tmp_path):
    text = ("Größe " * 50).encode()
    (tmp_path / "own.txt").write_bytes(text)
    train, test, vocabulary = load(str(tmp_path / "own.txt"))
    assert (len(test), vocabulary) == (40, 0xC3 + 1)
    windows = pickle.loads(pickle.dumps(Windows(test, context=39)))
    assert bytes(windows.read(np.array([0]))) == text[-40:]
    assert bytes(train) + bytes(test) == text


def save(folder, **parts):
    for name, tokens in parts.items():
        np.save(folder / f"{name}.npy", tokens)


def test_a_folder_of_tokens(tmp_path):
    (tmp_path / "corpus").mkdir()
    parts = {"train": np.arange(600, dtype=np.uint16), "test": np.array([7, 601], np.uint16)}
    save(tmp_path / "corpus", **parts)
    for text, data_dir in (("corpus", tmp_path), (str(tmp_path / "corpus"), None)):
        train, test, vocabulary = load(text, data_dir)
        assert isinstance(train, np.memmap)
        np.testing.assert_array_equal(train, parts["train"])
        np.testing.assert_array_equal(test, parts["test"])
        assert vocabulary == 602
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"vocabulary": 1000}))
    assert load("corpus", tmp_path).vocabulary == 1000


def test_what_is_no_text_is_one_sentence(tmp_path):
    with pytest.raises(
        UsageError, match=r"^there is no text 'corpus'; name tragedies, dialects, a file or, in .*made\.$"
    ):
        load("corpus", tmp_path)
    with pytest.raises(UsageError, match=r"^there is no text 'tragedy'; did you mean tragedies\?$"):
        load("tragedy", tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match=r"^the text .*empty of 0 bytes can't be read \(.*\)\.$"):
        load(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"^data_dir has no effect with the text tragedies"):
        load("tragedies", tmp_path)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UsageError, match=r"^.*/corpus/train.npy can't be read as an array \(.*No such file"):
        load("corpus", tmp_path)
    save(tmp_path / "corpus", train=np.zeros((2, 3), np.uint8))
    with pytest.raises(UsageError, match=r"train.npy must be a row of unsigned integers, got uint8 of shape \(2, 3\)"):
        load("corpus", tmp_path)
    save(tmp_path / "corpus", train=np.zeros(3, np.uint8))
    (tmp_path / "corpus" / "test.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match=r"test.npy can't be read as an array"):
        load("corpus", tmp_path)
