"""Writes data sets of texts as rows of tokens, which training memory-maps.

    lsgd data prepare lm1b --data-dir D --tokenizer bpe-8192
    lsgd train tragedies --text lm1b-bpe-8192 --data-dir D --vocabulary 8192

D/lm1b-bpe-8192 has train.npy and test.npy, all documents in a row, each followed by the token that ends it;
corpus.json, the numbers of documents and tokens; and tokenizer.model, with which SentencePiece decodes.
"""

import importlib.util
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lsgd_jax.checks import check_path
from lsgd_jax.data.builders import BUILDERS
from lsgd_jax.data.folders import data_folder
from lsgd_jax.data.preparation import encoded_examples, prepare, working_folder
from lsgd_jax.errors import UsageError

TRAINING_BYTES = 100_000_000
"""Most bytes of text on which a tokenizer is trained."""
_AT_ONCE = 1000
"""Documents that are read together."""


class Tokenizer(NamedTuple):
    """Turns documents into tokens."""

    vocabulary: int
    """Number of tokens."""
    encode: Callable[[bytes], Any]
    """From a document in UTF-8 to its tokens."""
    end: int = 0
    """Token that follows a document."""
    model: bytes = b""
    """SentencePiece's model; empty for bytes."""


BYTES = Tokenizer(256, lambda text: np.frombuffer(text, np.uint8))


def prepare_tokens(name: str, data_dir: Path | str | None = None, tokenizer: str = "bytes") -> Path:
    """Write the tokens of a data set of texts, which is prepared first if it is not; does nothing if they are there.

    Args:
      name: tiny_shakespeare, lm1b or pg19.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      tokenizer: "bytes"; "bpe-N", byte-pair encoding of N tokens, trained by SentencePiece on the training texts; or a
        model file of SentencePiece's.

    Returns:
      The folder of the tokens, in the data folder: the name, a hyphen, and the tokenizer or the name of its file.

    Raises:
      UsageError: if the data set can't be prepared, there is no such tokenizer, or the tokens can't be written.
    """
    _check_tokenizer(tokenizer)
    folder = data_folder(data_dir) / f"{name}-{Path(tokenizer).stem}"
    if (folder / "corpus.json").exists():
        return folder
    prepare(name, data_dir)
    try:
        with working_folder(name, folder.parent) as work:
            (made := work / "tokens").mkdir()
            tokens = _tokenizer(tokenizer, name, data_dir)
            about: dict[str, Any] = {"tokenizer": tokenizer, "vocabulary": tokens.vocabulary}
            for split in ("train", "test"):
                with (made / f"{split}.npy").open("wb") as file:
                    about[split] = _write(file, _documents(name, split, data_dir), tokens)
            if tokens.model:
                (made / "tokenizer.model").write_bytes(tokens.model)
            (made / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")
            made.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder} can't be written ({error.strerror}).") from None
    return folder


def _check_tokenizer(tokenizer: str) -> None:
    """Raise UsageError unless there can be such a tokenizer here."""
    if tokenizer == "bytes":
        return
    if importlib.util.find_spec("sentencepiece") is None:
        raise UsageError(f"the tokenizer {tokenizer} needs SentencePiece: pip install sentencepiece.")
    if not re.fullmatch(r"bpe-[1-9]\d{0,6}", tokenizer) and not check_path("tokenizer", tokenizer).is_file():
        raise UsageError(
            "tokenizer must be bytes, bpe- and a number of tokens, or a model file of SentencePiece,"
            f" got {tokenizer!r}."
        )


def _tokenizer(tokenizer: str, name: str, data_dir: Path | str | None) -> Tokenizer:
    if tokenizer == "bytes":
        return BYTES
    import sentencepiece

    path = Path(tokenizer)
    model = path.read_bytes() if path.is_file() else _trained(tokenizer, _documents(name, "train", data_dir))
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise UsageError(f"{tokenizer} is not a model file of SentencePiece.") from None
    end = max(processor.eos_id(), 0)
    return Tokenizer(processor.vocab_size(), lambda text: processor.encode(text.decode()), end, model)


def _trained(tokenizer: str, documents: Iterator[bytes]) -> bytes:
    """The model of a byte-pair encoding that keeps every character, and falls back to bytes for rare ones."""
    import sentencepiece

    def lines() -> Iterator[str]:
        left = TRAINING_BYTES
        for document in itertools.takewhile(lambda _: left > 0, documents):
            left -= len(document)
            yield from filter(None, document.decode().split("\n"))

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=int(tokenizer.removeprefix("bpe-")),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=2**20,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(f"{tokenizer} can't be trained on these texts: {str(error).splitlines()[-1]}") from None
    return model.getvalue()


def _documents(name: str, split: str, data_dir: Path | str | None) -> Iterator[bytes]:
    examples, feature = encoded_examples(name, split, data_dir), BUILDERS[name].text_feature
    for start in range(0, len(examples), _AT_ONCE):
        for example in examples.__getitems__(range(start, min(start + _AT_ONCE, len(examples)))):
            yield example[feature]


def _write(file: BinaryIO, documents: Iterator[bytes], tokenizer: Tokenizer) -> dict[str, int]:
    """Write the tokens of documents as an array into a file, one document after another."""
    dtype = np.min_scalar_type(tokenizer.vocabulary - 1)
    counts = {"documents": 0, "tokens": 0}
    _write_header(file, 0, dtype)
    for document in documents:
        row = np.append(np.asarray(tokenizer.encode(document), dtype), dtype.type(tokenizer.end))
        file.write(row.tobytes())
        counts = {"documents": counts["documents"] + 1, "tokens": counts["tokens"] + len(row)}
    file.seek(0)
    _write_header(file, counts["tokens"], dtype)
    return counts


def _write_header(file: BinaryIO, length: int, dtype: np.dtype) -> None:
    """Write the header of a row; NumPy pads it, so that it is equally long for any length."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
