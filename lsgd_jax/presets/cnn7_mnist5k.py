"""Figure 4 at laptop scale: CNN7 at a quarter of its width on 5,000 images of MNIST, 4 and 16 workers.

    lsgd compare cnn7-mnist5k-4 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd compare cnn7-mnist5k-16 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --target 0.08
    lsgd figure F4 --dataset mnist5k

The images come with a Python package; no download is needed.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Classification

CONFIGS: dict[str, Config] = {
    f"cnn7-mnist5k-{4 * groups}": Config(
        task=Classification(dataset="mnist5k", model="cnn7", width=0.25),
        steps=steps,
        learning_rate=0.008,
        learning_rate_drops=(0.7,),
        batch_size=16,
        groups=groups,
        workers=4,
        period=4,
        global_period=16 if groups > 1 else None,
        tune_learning_rates=(0.002, 0.008, 0.03),
        eval_every=steps // 20,
    )
    for groups, steps in ((1, 1000), (4, 400))
}
