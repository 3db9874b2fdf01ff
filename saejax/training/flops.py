"""FLOPs of a training step and peak of its devices: model FLOP/s utilisation (MFU).

The count covers the products that define the architecture, 2 operations per multiply-add. It leaves out top-k,
elementwise work, the optimiser, AuxK and recomputation. So the same training has the same count in any form of its
kernels, and a faster form has a higher MFU.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from saejax.sae import base
from saejax.sae.layout import EncoderKind

PEAKS: dict[str, float] = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA H200": 9.89e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA A100": 3.12e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA L40": 1.81e14,
    "NVIDIA L4": 1.21e14,
    "TPU v6 lite": 9.18e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v4": 2.75e14,
    "TPU v3": 6.15e13,
    "TPU v2": 2.25e13,
}
"""Dense bfloat16 FLOP/s of a device by how its `device_kind` begins, from the vendors' sheets; longer names first."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a step, and what its devices could do in that time.

    Attributes:
      per_step: operations of a step on all devices.
      peak: operations per second of all devices, None where it is not known.
    """

    per_step: float
    peak: float | None

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """model_flops_per_second and, where the peak is known, mfu: their ratio."""
        rate = self.per_step * steps_per_second
        return {"model_flops_per_second": rate} | ({} if self.peak is None else {"mfu": rate / self.peak})


def per_step(sparsifier: base.Sparsifier, batch: int) -> float:
    r"""Operations of one training step.

    With E and D numbers in `W_enc` and `W_dec`: an encoder product and its weights' gradient cost 2BE each; a decoder
    product, the latents' gradient and the weights' gradient 2BD each. A code of k latents touches only their share
    k / d_sae of all but the encoder product:

    .. math:: 2B (E + (E + 3D) k / d_{sae}) \quad\text{or, dense,}\quad 2B (2E + 3D).

    An architecture adds its own (`Sparsifier.more_products`). The unrolled encoder (`lista`) makes two more per step,
    forward and backward; an mlp encoder and a skip connection are dense: 3 products each.

    Args:
      sparsifier: the architecture.
      batch: rows per step.

    Examples:
      >>> from saejax.sae.topk import TopK
      >>> per_step(TopK(d_in=8, d_sae=32, k=4), batch=1) == 2 * (256 + (256 + 3 * 256) * 4 / 32)
      True
    """
    params = jax.eval_shape(sparsifier.init, jax.random.key(0))
    encoder, decoder = (math.prod(leaf.shape) for leaf in (params.W_enc, params.W_dec))
    others = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1) - encoder - decoder
    n_active = sparsifier.n_active
    share = 1.0 if n_active is None else n_active / sparsifier.d_sae
    products = encoder * (1 + share) + 3 * decoder * share + 3 * others
    products += sparsifier.more_products(encoder, decoder)
    if sparsifier.encoder is EncoderKind.lista:
        products += 3 * 2 * sparsifier.encoder_steps * encoder
    return 2.0 * batch * products


def work(sparsifier: base.Sparsifier, batch: int, n_devices: int, *, measure: bool = False) -> Work:
    """Work of a run per step, with the peak of its devices from the table or measured.

    Args:
      sparsifier: the architecture.
      batch: rows per step.
      n_devices: devices of the mesh.
      measure: whether a device that the table lacks is measured now, which takes a fraction of a second.
    """
    device = jax.local_devices()[0]
    peak = known_peak(device.device_kind)
    if peak is None and measure:
        # Fake CPU devices share the cores: one product keeps them all busy.
        peak = measured_peak(sparsifier.matmul_dtype.value) / (n_devices if device.platform == "cpu" else 1)
    return Work(per_step(sparsifier, batch), None if peak is None else peak * n_devices)


def known_peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a kind of device, None where the table lacks it.

    Examples:
      >>> known_peak("NVIDIA H100 80GB HBM3"), known_peak("cpu")
      (989000000000000.0, None)
    """
    return next((peak for name, peak in PEAKS.items() if device_kind.startswith(name)), None)


def measured_peak(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some square products with operands in `dtype` and a float32 result, on one device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32)).lower(a).compile()

    def seconds() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(product(a))
        return time.perf_counter() - begun

    seconds()
    return 2.0 * size**3 / min(seconds() for _ in range(repeats))
