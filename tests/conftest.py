"""Eight fake CPU devices and strict numerics for every test; set before anything imports JAX."""

import os

# Unawaited steps on more fake devices than cores deadlock in XLA's thread pool without NPROC.
os.environ.update(NPROC="16", JAX_PLATFORMS="cpu", WANDB_MODE="offline", HF_HUB_OFFLINE="1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
