"""The command `lsgd data`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lsgd_jax.errors import UsageError


def data(
    action: Annotated[Literal["prepare"], tyro.conf.Positional],
    name: Annotated[
        Literal["cifar10", "cifar100", "mnist", "imagenet2012", "tiny_shakespeare", "lm1b", "pg19"],
        tyro.conf.Positional,
    ],
    data_dir: Path | None = None,
    tokenizer: str | None = None,
) -> None:
    """Prepare a data set once, from archives in downloads/manual in the data folder or by downloading them.

    Texts (tiny_shakespeare, lm1b, pg19) are also written as tokens, into a folder that --text names in training.

    Args:
      action: action to take.
      name: data set. The archives of ImageNet and PG-19 can't be downloaded; see lsgd_jax/data/preparation.py for their
        names.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      tokenizer: for texts, bytes (the default), bpe-N (byte-pair encoding of N tokens, trained on the texts), or a
        model file of SentencePiece.
    """
    from lsgd_jax.data import preparation
    from lsgd_jax.data.builders import TEXTS

    if name in TEXTS:
        from lsgd_jax.data.text import tokens

        folder = tokens.prepare_tokens(name, data_dir, tokenizer or "bytes")
        print(f"{name} is prepared in {folder}: train with --text {folder.name}")
        return
    if tokenizer is not None:
        raise UsageError(f"tokenizer has no effect with {name}, whose examples are images.")
    already = "already " if preparation.is_prepared(name, data_dir) else ""
    print(f"{name} is {already}prepared in {preparation.prepare(name, data_dir)}")
