"""The C library's memory allocator, set up for training on CPUs."""

import ctypes
import importlib.util
import os

KEEP_MEMORY = "LSGD_KEEP_MEMORY"
"""Variable of the environment: 0 leaves the allocator as it is."""
_ACCELERATORS = "jax_plugins", "libtpu"
"""Packages of JAX's own accelerators, GPUs and TPUs."""
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads.
    -4: 0,  # M_MMAP_MAX: no memory of its own from the kernel for a large array.
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: so much is kept at the end of the heap.
    -2: 2**28,  # M_TOP_PAD: so much more is asked for whenever the heap grows.
}
"""Options of glibc's mallopt(3)."""


def keep_memory() -> None:
    """Keep the memory that a step frees for the next step, where JAX runs on CPUs.

    By default, glibc returns the memory of large arrays to the kernel, which clears it page by page when the next step
    asks for it again. Call this before the process has threads. It does nothing if the variable `LSGD_KEEP_MEMORY` is
    0, if one of glibc's own variables is set, without glibc, and where JAX may use an accelerator: there, arrays are
    not in this memory, and many threads compile.
    """
    of_user = any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ)
    on_cpus = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, _ACCELERATORS))
    if os.environ.get(KEEP_MEMORY) == "0" or of_user or not on_cpus:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in _SETTINGS.items() if mallopt else ():
        mallopt(option, value)
