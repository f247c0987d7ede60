"""Devices and the mesh that the workers lie on."""

import os

import jax
from jax.sharding import AxisType, Mesh

from lsgd_jax.errors import UsageError


def simulate_devices(count: int) -> None:
    """Let the CPU act as that many devices, unless the user's environment says how many it is.

    Call it before JAX is used: the number is fixed once a device has been asked for. GPUs and TPUs stay what they are.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", count)


def worker_mesh(groups: int, workers: int) -> Mesh:
    """A mesh with the axes ("group", "worker"), one worker a device.

    Raises:
      UsageError: if there are fewer devices than workers.
    """
    try:
        needed, devices = groups * workers, jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"JAX finds no devices ({error}): set JAX_PLATFORMS=cpu, or what there is.") from None
    if len(devices) < needed:
        raise UsageError(
            f"{groups} x {workers} workers need {needed} devices, but there are {len(devices)} ({devices[0].platform}):"
            " lower groups or workers, or simulate devices on the CPU with JAX_PLATFORMS=cpu and no device count set."
        )
    return jax.make_mesh(
        (groups, workers), ("group", "worker"), axis_types=(AxisType.Auto,) * 2, devices=devices[:needed]
    )
