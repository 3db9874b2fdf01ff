r"""LayerNormed: an SAE behind a normaliser of single rows (layer normalisation), which no weights can absorb.

.. math:: \tilde x = (x - m)/s, \quad m = \frac1d \sum_i x_i, \quad s^2 = \frac1d \sum_i (x_i - m)^2 + 10^{-5},
    \qquad \hat x = s\, \hat{\tilde x} + m

Training returns it if rows were normalised one by one; it is never trained itself. SAEs of other tools divide by other
lengths of a row (`kernels.row_norm.RowNorm`).
"""

import dataclasses
from typing import ClassVar

import jax
from flax import struct

from saejax.errors import UserError
from saejax.kernels import row_norm
from saejax.sae import base


@struct.dataclass
class RowEncoding(base.Encoding):
    """An encoding that remembers how its rows were normalised.

    Attributes:
      row_mean: [b, 1] float32.
      row_scale: [b, 1] float32.
    """

    row_mean: jax.Array | None = None
    row_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormed(base.Sparsifier):
    """`inner`, on normalised rows; its parameters are those of `inner`."""

    name: ClassVar[str] = "layer_normed"

    inner: base.Sparsifier
    """What sees the normalised rows."""
    kind: row_norm.RowNorm = row_norm.RowNorm.variance
    """What rows are divided by."""

    @classmethod
    def of(cls, inner: base.Sparsifier, kind: row_norm.RowNorm = row_norm.RowNorm.variance) -> "LayerNormed":
        """Returns the wrapper of an architecture."""
        return cls(d_in=inner.d_in, d_sae=inner.d_sae, inner=inner, kind=kind)

    @property
    def k_sparse(self):
        """As `inner`."""
        return self.inner.k_sparse

    @property
    def signed(self):
        """As `inner`."""
        return self.inner.signed

    @property
    def n_active(self):
        """As `inner`."""
        return self.inner.n_active

    @property
    def row_norm(self):
        """`kind`."""
        return self.kind

    def exported(self, params):
        """Returns the same around what `inner` is exported as."""
        inner, params = self.inner.exported(params)
        return LayerNormed.of(inner, self.kind), params

    def init(self, key):
        """Draws the parameters of `inner`."""
        return self.inner.init(key)

    def encode(self, params, x):
        """Returns the latents of the normalised rows, with what undoes the normalisation."""
        rows, mean, scale = row_norm.normalized(x, self.kind)
        found = self.inner.encode(params, rows)
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(base.Encoding)}
        return RowEncoding(**parts, row_mean=mean, row_scale=scale)

    def decode(self, params, encoding):
        """Returns the reconstruction in the data's own scale.

        Raises:
          UserError: latents alone do not say how their rows were normalised.
        """
        if not isinstance(encoding, RowEncoding) or encoding.row_mean is None or encoding.row_scale is None:
            raise UserError(
                "latents must be decoded together with their rows, as this SAE normalises each row "
                "(normalize.mode=layer_norm): use sae(x), or decode what sae.encoding(x) gave"
            )
        return self.inner.decode(params, encoding) * encoding.row_scale + encoding.row_mean

    def activate(self, params, pre_acts, step=None):
        """As `inner`."""
        return self.inner.activate(params, pre_acts, step)

    def objective(self, params, x, target, step):
        """Refuses: `inner` is what is trained."""
        raise UserError("layer_normed is made by loading a run and cannot be trained")
