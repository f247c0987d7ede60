"""What fewer bytes and later pulls cost in test error: LSGD on MNIST-1D with each way to send a leader.

    python -m benchmarks.communication.convergence --seeds 3 --steps 1000

One group of 4 workers. Seeds are the same for all, so that differences to full precision are taken seed by seed.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax import distributed
from lsgd_jax.compare.statistics import over_seeds
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.train.compile_ahead import parameter_shapes

RESULTS = Path(__file__).parent / "results" / "convergence.json"
SENDING: dict[str, dict[str, Any]] = {
    "full precision": {},
    "bfloat16": {"wire": "bfloat16"},
    "int8": {"wire": "int8"},
    "delay 1": {"delay": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    steps = arguments.steps
    base = dataclasses.replace(PRESETS["mnist1d"], groups=1, steps=steps, eval_every=steps)
    distributed.simulate_devices(base.workers)
    shapes, summary = parameter_shapes(base), dict[str, dict[str, Any]]()
    for name, options in SENDING.items():
        config = dataclasses.replace(base, **options)
        errors = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                errors.append(train_and_evaluate(dataclasses.replace(config, seed=seed), run, lines=False))
            print(f"{name}, seed {seed}: {errors[-1]:.2%}", flush=True)
        summary[name] = {"final_center_error": errors, "bytes_sent": bytes_sent(config, shapes, steps)}
    exact = np.array(summary["full precision"]["final_center_error"])
    print("| how leaders are sent | MB a worker | final test error | minus full precision, seed by seed (95 %) |")
    print("|---|---|---|---|")
    for name, of in summary.items():
        error = np.array(of["final_center_error"])
        difference = over_seeds(error - exact)
        half = "" if difference["half_width"] is None else f" ± {difference['half_width']:.2%}"
        cells = f"{of['bytes_sent'] / 1e6:.1f} | {error.mean():.2%} | {(error - exact).mean():+.2%}{half}"
        print(f"| {name} | {cells} |")
    result = {"steps": steps, "workers": base.workers, "seeds": arguments.seeds, "ways": summary}
    arguments.out.write_text(json.dumps(result | {"environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
