"""Parameters of an SAE, and the auxiliary results of its loss."""

import jax
from flax import struct

from saejax.fields import leaves
from saejax.sae.encoding import Encoding

# Of a hidden layer before the encoder, and of a transcoder's linear map: neither has an axis of latents.
leaves.declare(__name__, {"W_hidden": None, "b_hidden": None, "W_skip": None})


@struct.dataclass
class SAEParams:
    """The trainable arrays of one SAE, float32, never transposed.

    Attributes:
      W_enc: Encoder, [d_in, d_sae] ([encoder_hidden, d_sae] behind a hidden layer; [d, d_sae] for family=clt, where
        column j reads the one site of its group).
      b_enc: Bias of the latents, [d_sae].
      W_dec: Decoder, one row per latent, [d_sae, d_out].
      b_dec: Bias of the reconstruction, [d_out].
      extra: What one architecture or option adds, by name.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    extra: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class Aux:
    """Auxiliary results of a loss.

    Attributes:
      recon: Reconstruction of the (normalised) target, [b, d_out] float32.
      encoding: The encoding behind it.
      terms: Loss terms by name, before their coefficients ("mse", "aux_k", "l1", ...), scalars.
    """

    recon: jax.Array
    encoding: Encoding
    terms: dict[str, jax.Array]
