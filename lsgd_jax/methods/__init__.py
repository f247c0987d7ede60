"""The methods that Leader SGD is compared with, one short file each."""

from lsgd_jax.methods.easgd import EasgdState, easgd

__all__ = ["EasgdState", "easgd"]
