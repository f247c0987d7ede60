"""Language models: a decoder-only transformer that predicts the next token of a text."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lsgd_jax.data.examples import BlankStream, Data
from lsgd_jax.data.text import Dialects, Windows, load
from lsgd_jax.errors import UsageError
from lsgd_jax.task import Headline, Task

if TYPE_CHECKING:
    from flax import nnx

DIALECTS = Dialects()
"""The generated language of the text "dialects"."""


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """Transformer trained on windows of a text; the loss is the cross-entropy of a token in nats."""

    headline: ClassVar[Headline] = Headline(perplexity=True)

    text: str = "tragedies"
    """Text: tragedies, dialects, a file, or a folder of tokens that `lsgd data prepare` has made. The tragedies are
    seven of Shakespeare's, byte by byte, Timon of Athens for testing; dialects is a generated language of known
    entropy; a file is read byte by byte, its last tenth for testing."""
    vocabulary: int = 256
    """Number of tokens that the network knows, at least those of the text."""
    context: int = 64
    """Tokens of an example that predict the next one each."""
    width: int = 64
    """Width of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads per block."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the feed-forward layers."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them in memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the network computes; parameters are float32."""

    def data(self, data_dir: Path | str | None = None) -> Data:
        """Load windows of the text.

        Raises:
          UsageError: if there is no such text, or it has more tokens than the vocabulary or no whole window.
        """
        if self.text == "dialects":
            if data_dir is not None:
                raise UsageError("data_dir has no effect with the text dialects, which is generated.")
            self._check_vocabulary(DIALECTS.symbols)
            return Data(
                *(_in_dialects(documents, self.context + 1, seed) for seed, documents in enumerate((4096, 256)))
            )
        corpus = load(self.text, data_dir)
        self._check_vocabulary(corpus.vocabulary)
        train, test = (Windows(tokens, self.context) for tokens in (corpus.train, corpus.test))
        if not (len(train) and len(test)):
            shortest = min(len(corpus.train), len(corpus.test))
            raise UsageError(f"context must be below the {shortest} tokens of a part of the text, got {self.context}.")
        if self.is_streamed:
            return Data(train, test)
        return Data(*(windows.read(np.arange(len(windows))) for windows in (train, test)))

    def blank(self) -> Data:
        """Return blank windows, as many as there are or, of texts in files, a million."""
        if not self.is_streamed:
            return self.data()
        window = jax.ShapeDtypeStruct((self.context + 1,), np.min_scalar_type(self.vocabulary - 1))
        return Data(BlankStream(10**6, window), BlankStream(10**4, window))

    def network(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Make the transformer."""
        from lsgd_jax.models.transformer import Transformer

        return Transformer(
            self.vocabulary,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            activation=self.activation,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
            rngs=rngs,
        )

    def measures(self, network: "nnx.Module", examples: Any) -> dict[str, Float[Array, " examples"]]:
        """Return the mean cross-entropy of each window's tokens."""
        tokens = examples.astype(jnp.int32)
        logits = network(tokens[:, :-1])
        return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(1)}

    @property
    def is_streamed(self) -> bool:
        """Whether windows are read from files as they are needed."""
        return self.text not in ("tragedies", "dialects")

    @property
    def counted_in(self) -> tuple[str, int]:
        """Return that training data are counted in tokens."""
        return "tokens", self.context

    def check(self) -> None:
        """Raise ValueError if a field is out of range."""
        super().check()
        for name in ("vocabulary", "context", "width", "depth", "heads"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be in [1, 2^31), got {getattr(self, name)}.")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads, {2 * self.heads}, got {self.width}.")

    def __str__(self) -> str:
        """Return the names of network and text."""
        return f"transformer-{Path(self.text).stem}"

    def _check_vocabulary(self, needed: int) -> None:
        if self.vocabulary < needed:
            raise UsageError(f"vocabulary must be at least the {needed} tokens of {self.text}, got {self.vocabulary}.")


def _in_dialects(documents: int, length: int, seed: int) -> np.ndarray:
    """So many documents of each dialect, sorted by dialect: contiguous parts of them differ."""
    return DIALECTS.documents(np.repeat(np.arange(DIALECTS.dialects), documents), length, seed)
