"""Data sets of texts, prepared from made-up archives in the published formats, as rows of tokens."""

import itertools
import json
import socket

import numpy as np
import pytest
import sentencepiece

from lsgd_jax import cli
from lsgd_jax.data import builders, preparation
from lsgd_jax.data.text import load, tokens
from lsgd_jax.errors import UsageError
from tests.data import archives

MAKE = {
    "tiny_shakespeare": archives.make_tiny_shakespeare,
    "lm1b": archives.make_lm1b,
    "pg19": archives.make_pg19,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_):
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder in which all data sets of texts are prepared, and their documents."""
    data_dir = tmp_path_factory.mktemp("data")
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    truth = {name: make(folder) for name, make in MAKE.items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in MAKE:
            if name != "pg19":  # It has no checksum.
                archives.accept(monkeypatch, name, folder)
            preparation.prepare(name, data_dir)
    return data_dir, truth


def documents(row, end):
    """The parts of a row of tokens that each end with this token."""
    ends = np.flatnonzero(row == end)
    assert ends[-1] == len(row) - 1
    return [row[first:last] for first, last in itertools.pairwise([0, *(ends + 1)])]


def test_the_names_are_those_of_the_command():
    assert set(MAKE) == set(builders.TEXTS)


@pytest.mark.parametrize("name", MAKE)
def test_bytes_of_all_documents_are_in_the_rows(name, texts):
    data_dir, truth = texts
    folder = tokens.prepare_tokens(name, data_dir)
    assert folder == data_dir / f"{name}-bytes"
    corpus, about = load(folder.name, data_dir), json.loads((folder / "corpus.json").read_text())
    assert about["vocabulary"] == corpus.vocabulary == 256
    for split in ("train", "test"):
        row = getattr(corpus, split)
        assert isinstance(row, np.memmap)
        assert row.dtype == np.uint8
        found = [bytes(each[:-1]).decode() for each in documents(row, 0)]
        assert sorted(found) == sorted(truth[name][split])
        assert about[split] == {"documents": len(found), "tokens": len(row)}


def test_a_trained_tokenizer_loses_nothing(texts):
    data_dir, truth = texts
    folder = tokens.prepare_tokens("lm1b", data_dir, "bpe-300")
    corpus = load("lm1b-bpe-300", data_dir)
    assert corpus.vocabulary == 300
    assert corpus.train.dtype == np.uint16
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for split in ("train", "test"):
        found = [processor.decode(each[:-1].tolist()) for each in documents(getattr(corpus, split), 0)]
        assert sorted(found) == sorted(truth["lm1b"][split])
    assert len(corpus.train) < 0.6 * len(load("lm1b-bytes", data_dir).train)
    # The same tokenizer for another data set: by its file, and with characters and lines that it has never seen.
    own = tokens.prepare_tokens("tiny_shakespeare", data_dir, str(folder / "tokenizer.model"))
    assert own.name == "tiny_shakespeare-tokenizer"
    text = "Línea\n\n  two "
    assert processor.decode(processor.encode(text)) == text


def test_what_is_written_is_written_once(texts):
    data_dir, _ = texts
    folder = tokens.prepare_tokens("pg19", data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tokens.prepare_tokens("pg19", data_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list(data_dir.glob(".pg19-*"))


def test_the_command(texts, capsys):
    data_dir, _ = texts
    assert cli.main(["data", "prepare", "pg19", "--data-dir", str(data_dir)]) == 0
    assert capsys.readouterr().out == f"pg19 is prepared in {data_dir}/pg19-bytes: train with --text pg19-bytes\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lm1b"], "www.statmt.org can't be reached: put 1-billion-word-"),
        (["tiny_shakespeare"], "raw.githubusercontent.com can't be reached: put input.txt from https://"),
        (["pg19"], "put deepmind-gutenberg into "),
        (["lm1b", "--tokenizer", "words"], "tokenizer must be bytes, bpe- and a number of tokens, or a model file of"),
        (["mnist", "--tokenizer", "bytes"], "tokenizer has no effect with mnist, whose examples are images."),
    ],
)
def test_without_network_or_tokenizer_it_is_one_sentence(arguments, sentence, tmp_path, capsys):
    assert cli.main(["data", "prepare", *arguments, "--data-dir", str(tmp_path / "new")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"lsgd: {sentence}")
    assert output.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_cannot_be_is_one_sentence_and_leaves_nothing(texts, tmp_path):
    data_dir, _ = texts
    before = sorted(data_dir.iterdir())
    with pytest.raises(UsageError, match=r"^bpe-99999 can't be trained on these texts: .*[Vv]ocab"):
        tokens.prepare_tokens("lm1b", data_dir, "bpe-99999")
    (tmp_path / "model").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"model is not a model file of SentencePiece"):
        tokens.prepare_tokens("lm1b", data_dir, str(tmp_path / "model"))
    assert sorted(data_dir.iterdir()) == before


def test_a_book_without_its_line_in_the_list_is_one_sentence(tmp_path):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    archives.make_pg19(folder)
    (folder / "deepmind-gutenberg" / "metadata.csv").write_text("10,Book 10,1810,link\n")
    with pytest.raises(UsageError, match=r"metadata.csv has no title, date and link of .*11.txt"):
        preparation.prepare("pg19", tmp_path)
    assert not (tmp_path / "pg19").exists()
