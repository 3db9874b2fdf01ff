"""`SAE`: an architecture with its trained parameters, in the data's own scale.

Training folds its normalisation into the parameters and returns this; evaluation, export and users start from it.
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

    Examples:
      >>> from saejax.sae import TopK
      >>> config = TopK(d_in=8, d_sae=32, k=4)
      >>> sae = SAE(config, config.init(jax.random.key(0)))
      >>> sae.encode(jnp.ones((2, 3, 8))).shape, sae(jnp.ones(8)).shape
      ((2, 3, 32), (8,))

    A transcoder reads other sites than it writes: `x` is then its input, and the output its prediction; `split` takes
    whole rows apart.
    """

    sparsifier: base.Sparsifier
    params: base.SAEParams
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> base.Sparsifier:
        """The architecture and its sizes."""
        return self.sparsifier

    @property
    def sites(self) -> tuple[int, ...]:
        """Widths of the parts of a row, in order; one where there is only one."""
        return self.sparsifier.sites or (self.sparsifier.d_in,)

    def split(self, rows: Float[Array, "... d_row"]) -> tuple[Float[Array, "... d_in"], Float[Array, "... d_out"]]:
        """Splits rows of all sites into input and target; both are the same, except for transcoders."""
        whole, lead = self._rows(rows, self.sparsifier.d_row, "d_row")
        x, target = self.sparsifier.split(whole)
        return x.reshape(*lead, -1), target.reshape(*lead, -1)

    def encode(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_sae"]:
        """Returns the latents, dense."""
        rows, lead = self._rows(x, self.sparsifier.d_in, "d_in")
        return _encode_dense(self.sparsifier, self.params, rows).reshape(*lead, self.sparsifier.d_sae)

    def encoding(self, x: Float[Array, "b d_in"]) -> base.Encoding:
        """Returns the latents in the architecture's own form, k-sparse or dense."""
        rows, _ = self._rows(x, self.sparsifier.d_in, "d_in")
        return _encode(self.sparsifier, self.params, rows)

    def decode(
        self, latents: Float[Array, "... d_sae"] | base.Encoding, x: Float[Array, "... d_in"] | None = None
    ) -> Float[Array, "... d_out"]:
        """Returns the reconstruction from dense latents, or from an `Encoding`.

        Args:
          latents: Latents, one row per reconstruction.
          x: Input of the latents; only a transcoder with `skip` needs it.

        Raises:
          ValueError: a wrong width, or a transcoder with `skip` without `x`.
        """
        if self.sparsifier.skip and x is None:
            raise ValueError("decode needs x as well: this transcoder has a linear map past its latents (skip=true)")
        if isinstance(latents, base.Encoding):
            encoding, lead = latents, ()
        else:
            rows, lead = self._rows(latents, self.sparsifier.d_sae, "d_sae")
            encoding = base.Encoding(latents=rows, d_sae=self.sparsifier.d_sae)
        read = self._rows(x, self.sparsifier.d_in, "d_in")[0] if self.sparsifier.skip else None
        recon = _decode(self.sparsifier, self.params, encoding, read)
        return recon if isinstance(latents, base.Encoding) else recon.reshape(*lead, self.sparsifier.d_out)

    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        """Returns the reconstruction of x, or a transcoder's prediction from it."""
        rows, lead = self._rows(x, self.sparsifier.d_in, "d_in")
        return _reconstruct(self.sparsifier, self.params, rows).reshape(*lead, self.sparsifier.d_out)

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
def _decode(
    sparsifier: base.Sparsifier, params: base.SAEParams, encoding: base.Encoding, x: jax.Array | None
) -> jax.Array:
    recon = sparsifier.decode(params, encoding)
    return recon if x is None else sparsifier.add_skip(params, recon, x)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(sparsifier: base.Sparsifier, params: base.SAEParams, x: jax.Array) -> jax.Array:
    return sparsifier.add_skip(params, sparsifier.decode(params, sparsifier.encode(params, x)), x)
