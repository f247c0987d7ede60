"""What each chip sends and holds in an exchange among workers of many chips, compiled for a TPU topology.

    python -m benchmarks.communication.sharded [--topology v5e:16x16] [--chips 32]

The parameters are those of a transformer of 1.2 B, its layers stacked, in float32. Nothing runs, and no TPU is needed;
libtpu is. "of its share" is what goes to other workers, beside 1/N of what whole workers would send.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from lsgd_jax.costs.collectives import collectives
from lsgd_jax.costs.ledger import rounded_collectives
from lsgd_jax.exchange import BroadcastMethod, Wire
from lsgd_jax.train.compile_ahead import described_devices

RESULTS = Path(__file__).parent / "results" / "sharded.json"
WAYS: list[tuple[BroadcastMethod, Wire | None]] = [
    ("all_reduce", None),
    ("all_reduce", "bfloat16"),
    ("all_reduce", "int8"),
    ("ring", None),
]
SHAPES = {
    "embedding": (32768, 2048),
    "attention": (18, 4, 2048, 2048),
    "gate and up": (18, 2, 2048, 8192),
    "down": (18, 8192, 2048),
    "scales": (37, 2048),
}


def main() -> None:
    """Compile, print a table and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--chips", type=int, default=32, help="of each worker")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    devices = described_devices(arguments.topology)

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from lsgd_jax.distributed import CHIP, place
    from lsgd_jax.distributed.placement import STACKED
    from lsgd_jax.exchange import largest_axis, sending
    from lsgd_jax.leader import leader_pull

    chips, workers = arguments.chips, len(devices) // arguments.chips
    specs = partial(largest_axis, axis_name=CHIP, size=chips)
    placement = place(1, workers, devices, chips=chips, shard_specs=specs)
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}

    def stacked(tree: object) -> object:
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                (*placement.shape, *x.shape), x.dtype, sharding=placement.sharding(spec)
            ),
            tree,
            placement.specs(params, tree),
        )

    rows = []
    for method, wire in WAYS:
        tx = leader_pull(0.1, axis_name=placement.axes, sending=sending(wire, method, specs))

        def exchange(params: dict, state: object, loss: object, tx: optax.GradientTransformation = tx) -> tuple:
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, value=loss)
            return optax.apply_updates(params, updates), state

        arrays = tuple(map(stacked, (params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), np.float32))))
        shardings = jax.tree.map(lambda x: x.sharding, arrays[:2])
        program = jax.jit(
            placement.over_workers(exchange, (STACKED,) * 3, (STACKED,) * 2),
            donate_argnums=(0, 1),
            out_shardings=shardings,
        )
        compiled = program.lower(*arrays).compile()
        found = collectives(compiled.as_text() or "", chips)
        whole = sum(
            each.sent * (each.times or 0)
            for each in rounded_collectives(list(params.values()), (workers,), method, wire)
        )
        among = [each for each in found if not each.within_worker]
        sent = sum(each.sent * (each.times or 0) for each in among)
        memory: Any = compiled.memory_analysis()
        rows.append(
            {
                "method": method,
                "wire": wire,
                "sent per chip": sent,
                "of its share": sent / (whole / chips),
                "within a worker": sum(each.bytes * (each.times or 0) for each in found if each.within_worker),
                "kinds": sorted({each.kind for each in found}),
                "arguments per chip": memory.argument_size_in_bytes,
                "temporaries per chip": memory.temp_size_in_bytes,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    count = sum(int(np.prod(shape)) for shape in SHAPES.values())
    result = {"topology": arguments.topology, "parameters": count, "workers": workers, "chips": chips, "ways": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
