"""Eight simulated devices, set before JAX wakes, and strict promotion of ranks."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
