"""What users hold: an architecture with its trained parameters, working in the data's own scale.

Training hands over here after folding its normalisation into the parameters; evaluation, export and people
start here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.sae import base


@dataclasses.dataclass(frozen=True)
class SAE:
    """A trained sparse autoencoder.

    Attributes:
      sparsifier: The architecture and its sizes; also `config`.
      params: Parameters in the data's own scale.
      provenance: Where it comes from (model, hook, data, versions), JSON-able.

    Example:
      >>> from saejax.sae import TopK
      >>> config = TopK(d_in=8, d_sae=32, k=4)
      >>> sae = SAE(config, config.init(jax.random.key(0)))
      >>> sae.encode(jnp.ones((2, 3, 8))).shape, sae(jnp.ones(8)).shape
      ((2, 3, 32), (8,))
    """

    sparsifier: base.Sparsifier
    params: base.SAEParams
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> base.Sparsifier:
        """The architecture and its sizes."""
        return self.sparsifier

    def encode(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_sae"]:
        """Returns the latents, dense."""
        rows, lead = self._rows(x, self.sparsifier.d_in, "d_in")
        return _encode_dense(self.sparsifier, self.params, rows).reshape(*lead, self.sparsifier.d_sae)

    def encoding(self, x: Float[Array, "b d_in"]) -> base.Encoding:
        """Returns the latents in the architecture's own form (k-sparse where it is)."""
        rows, _ = self._rows(x, self.sparsifier.d_in, "d_in")
        return _encode(self.sparsifier, self.params, rows)

    def decode(self, latents: Float[Array, "... d_sae"] | base.Encoding) -> Float[Array, "... d_in"]:
        """Returns the reconstruction from dense latents, or from an `Encoding`."""
        if isinstance(latents, base.Encoding):
            return _decode(self.sparsifier, self.params, latents)
        rows, lead = self._rows(latents, self.sparsifier.d_sae, "d_sae")
        encoding = base.Encoding(latents=rows, d_sae=self.sparsifier.d_sae)
        return _decode(self.sparsifier, self.params, encoding).reshape(*lead, self.sparsifier.d_in)

    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_in"]:
        """Returns the reconstruction of x."""
        rows, lead = self._rows(x, self.sparsifier.d_in, "d_in")
        return _reconstruct(self.sparsifier, self.params, rows).reshape(*lead, self.sparsifier.d_in)

    @staticmethod
    def _rows(x: Any, width: int, name: str) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns x as float32 rows, and the leading dimensions to give back."""
        x = jnp.asarray(x, jnp.float32)
        if x.ndim == 0 or x.shape[-1] != width:
            raise ValueError(f"the last dimension must be {name}={width}, got shape {x.shape}")
        return x.reshape(-1, width), x.shape[:-1]


@functools.partial(jax.jit, static_argnums=0)
def _encode(sparsifier: base.Sparsifier, params: base.SAEParams, x: jax.Array) -> base.Encoding:
    return sparsifier.encode(params, x)


@functools.partial(jax.jit, static_argnums=0)
def _encode_dense(sparsifier: base.Sparsifier, params: base.SAEParams, x: jax.Array) -> jax.Array:
    return sparsifier.encode(params, x).dense()


@functools.partial(jax.jit, static_argnums=0)
def _decode(sparsifier: base.Sparsifier, params: base.SAEParams, encoding: base.Encoding) -> jax.Array:
    return sparsifier.decode(params, encoding)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(sparsifier: base.Sparsifier, params: base.SAEParams, x: jax.Array) -> jax.Array:
    return sparsifier.decode(params, sparsifier.encode(params, x))
