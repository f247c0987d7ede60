"""Language models: a transformer on seven tragedies of Shakespeare, on a generated language, and one for pods.

    lsgd train tragedies
    lsgd compare tragedies --methods lsgd,local_sgd,diloco,data_parallel --seeds 0..2 --tune
    lsgd train dialects
    lsgd train dialects --sampling partitions
    lsgd compile gpt-1b --topology v5e:16x16 --chips-per-worker 32

`tragedies` has 0.2 million parameters. The pull is 1 over the number of workers, the strongest that EASGD takes, too.

`dialects` is a Markov chain of order 2 in four dialects: the test loss of the best possible predictor is 1.8964 nats
(`lsgd_jax.data.text.Dialects.best_loss`). With `--sampling partitions` each of the four workers has documents of
its own dialect only (not i.i.d.).

`gpt-1b` has 0.98 billion parameters; `lsgd data prepare lm1b --tokenizer bpe-32768` makes its tokens.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Language

_SMALL = Config(
    task=Language(text="tragedies", vocabulary=128),
    steps=1280,
    learning_rate=0.01,
    local_optimizer="adamw",
    adam_b2=0.98,
    weight_decay=0.1,
    clip_norm=1.0,
    learning_rate_warmup=0.05,
    learning_rate_schedule="cosine",
    batch_size=8,
    groups=1,
    workers=4,
    period=16,
    pull=0.25,
    eval_every=80,
)

CONFIGS: dict[str, Config] = {
    "tragedies": _SMALL,
    "dialects": _SMALL.replace(task=Language(text="dialects", vocabulary=16)),
    "gpt-1b": _SMALL.replace(
        task=Language(
            text="lm1b-bpe-32768",
            vocabulary=32_768,
            context=2048,
            width=2048,
            depth=18,
            heads=16,
            activation="swiglu",
            remat=True,
            dtype="bfloat16",
        ),
        steps=100_000,
        learning_rate=3e-4,
        adam_b2=0.95,
        learning_rate_warmup=0.02,
        batch_size=64,
        workers=8,
        period=64,
        pull=0.125,
        eval_every=1000,
    ),
}
