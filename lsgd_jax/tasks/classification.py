"""Classification of images and signals, the paper's experiments."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.data import DESCRIPTIONS, BlankStream, Data, blank, load
from lsgd_jax.errors import UsageError
from lsgd_jax.task import Headline, Task

if TYPE_CHECKING:
    from flax import nnx

DatasetName: TypeAlias = Literal[
    "mnist1d", "mnist1d-10k", "digits", "mnist5k", "mnist", "cifar10", "cifar100", "imagenet2012"
]
NetworkName: TypeAlias = Literal["conv1d", "mlp", "cnn7", "vgg16", "resnet20", "resnet50"]


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Network for images or signals, trained by cross-entropy and tested by its errors."""

    headline: ClassVar[Headline] = Headline("error", "test error", percent=True, target=0.05)

    dataset: DatasetName = "mnist1d"
    """Data set. Some come with packages: MNIST-1D (4,000 training and 1,000 test signals of 40 samples; mnist1d-10k has
    10,000 other test signals), the digits of scikit-learn (1,437 and 360 images of 8x8 pixels) and 5,000 images of
    MNIST (4,000 and 1,000). The others are prepared once with `lsgd data prepare`."""
    model: NetworkName = "conv1d"
    """Network that every worker trains."""
    width: float = 1.0
    """Width multiplier relative to the published architecture."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the network computes; parameters are float32."""
    image_size: int = 224
    """Side length in pixels of ImageNet's images after cropping."""

    def data(self, data_dir: Path | str | None = None) -> Data:
        """Load examples and labels."""
        if self.is_streamed:
            from lsgd_jax.data.imagenet import ImageNet

            return Data(*(ImageNet(split, self.image_size, data_dir) for split in ("train", "validation")))
        data = load(self.dataset, data_dir)
        return Data((data.train_x, data.train_y), (data.test_x, data.test_y))

    def blank(self) -> Data:
        """Return blank examples with labels."""
        about = DESCRIPTIONS[self.dataset]
        shape = self._shape if self.is_streamed else about.shape
        like = jax.ShapeDtypeStruct(shape, about.dtype), jax.ShapeDtypeStruct((), np.int32)
        return Data(*((BlankStream if self.is_streamed else blank)(count, like) for count in (about.train, about.test)))

    def network(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Make the network for the shape of the data set's examples.

        Raises:
          UsageError: if it does not fit the data.
        """
        from lsgd_jax.models import MODELS

        (build, dimensions), shape = MODELS[self.model], self._shape
        if dimensions is not None and len(shape) != dimensions:
            fit = [name for name, (_, needed) in MODELS.items() if needed in (None, len(shape))]
            raise UsageError(
                f"the model {self.model} is not for the data set {self.dataset}, whose examples have the shape"
                f" {shape}: use {' or '.join(fit)}."
            )
        classes, dtype = DESCRIPTIONS[self.dataset].classes, jnp.dtype(self.dtype)
        try:
            return build(shape, classes, width=self.width, dtype=dtype, rngs=rngs)
        except ValueError as error:
            raise UsageError(f"the model {self.model} is not for the data set {self.dataset}: {error}") from None

    def loss(self, network: "nnx.Module", batch: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        """Return the cross-entropy of a batch, augmented if the data set defines augmentation."""
        from flax import nnx

        x, y = batch
        data_key, dropout_key = jax.random.split(key)
        preprocessing = DESCRIPTIONS[self.dataset].preprocessing
        x = x if preprocessing is None else preprocessing.training(x, data_key)
        logits = network(x, rngs=nnx.Rngs(dropout=dropout_key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def measures(self, network: "nnx.Module", examples: Any) -> dict[str, Float[Array, " examples"]]:
        """Return errors and cross-entropies; an example with a logit that is not finite counts as wrong."""
        x, y = examples
        preprocessing = DESCRIPTIONS[self.dataset].preprocessing
        logits = network(x if preprocessing is None else preprocessing.testing(x))
        wrong = (jnp.argmax(logits, -1) != y) | ~jnp.isfinite(logits).all(-1)
        return {"error": wrong, "loss": optax.softmax_cross_entropy_with_integer_labels(logits, y)}

    def with_random_targets(self, batch: Any, key: PRNGKeyArray) -> Any:
        """Return the batch with random labels."""
        x, y = batch
        return x, jax.random.randint(key, y.shape, 0, DESCRIPTIONS[self.dataset].classes, y.dtype)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has batch normalization."""
        from lsgd_jax.models import BATCH_NORM

        return self.model in BATCH_NORM

    @property
    def is_streamed(self) -> bool:
        """Whether images are decoded as they are needed."""
        return self.dataset == "imagenet2012"

    def no_effect(self, name: str) -> str | None:
        """Return why a field has no effect."""
        return "unless the dataset is imagenet2012" if name == "image_size" and not self.is_streamed else None

    def check(self) -> None:
        """Raise ValueError if a field is out of range."""
        if not 0 < self.width <= 64:
            raise ValueError(f"width must be in (0, 64], got {self.width}.")
        if not 1 <= self.image_size < 2**31:
            raise ValueError(f"image_size must be in [1, 2^31), got {self.image_size}.")

    def __str__(self) -> str:
        """Return the names of network and data set."""
        return f"{self.model}-{self.dataset}"

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of an example as the network sees it."""
        about = DESCRIPTIONS[self.dataset]
        side = self.image_size if self.is_streamed else about.preprocessing and about.preprocessing.crop
        return about.shape if side is None else (side, side, about.shape[-1])
