"""Figure 7: ResNet50 on ImageNet, 4 workers in one group.

    lsgd data prepare imagenet2012
    lsgd compare resnet50-imagenet-4 --methods lsgd,easgd,downpour --seeds 0
    lsgd figure F7

Read off the paper, the final top-1 test error of the center is 25 % for LSGD, 26 % for EASGD and 26 % for DOWNPOUR.

90 epochs of 5,004 steps; the learning rate drops after 30 and 60, as in the paper. Batches of 64 per worker are this
project's choice.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Classification

CONFIGS: dict[str, Config] = {
    "resnet50-imagenet-4": Config(
        task=Classification(dataset="imagenet2012", model="resnet50"),
        steps=90 * 5004,
        learning_rate=0.1,
        learning_rate_drops=(30, 60),
        learning_rate_drops_in="epochs",
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=64,
        groups=1,
        workers=4,
        period=4,
        window=64,
        tune_learning_rates=(0.1, 0.01, 0.001),
        tune_periods=(4, 16, 64),
        eval_every=5004,
    )
}
