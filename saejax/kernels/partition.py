"""Partition of a kernel over the mesh: rows over "data", latents over "latent", or neither.

Every kernel reads the context mesh (`jax.set_mesh`) here. Without a mesh, or where a size does not divide evenly, the
kernel runs as plain code, which is always correct.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

DATA = "data"
LATENT = "latent"


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes that cut the rows of a batch and the latents; None where an axis does not cut."""

    rows: str | None
    latents: str | None

    def run(self, body: Callable, in_specs: tuple[P, ...], out_specs) -> Callable:
        """Returns `body` mapped over the shards, or `body` itself when nothing is cut."""
        if self.rows is None and self.latents is None:
            return body
        # The checker cannot see that a gather or a sum over an axis makes its result the same on all of it.
        return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum_rows(self, part: jax.Array) -> jax.Array:
        """Adds the parts of the shards of rows."""
        return part if self.rows is None else jax.lax.psum(part, self.rows)

    def sum_latents(self, part: jax.Array) -> jax.Array:
        """Adds the parts of the shards of latents."""
        return part if self.latents is None else jax.lax.psum(part, self.latents)

    def first_latent(self, n_local: int) -> jax.Array | int:
        """Returns the global number of this shard's first latent, each shard holding `n_local`."""
        return 0 if self.latents is None else jax.lax.axis_index(self.latents) * n_local


def equal_blocks(n_rows: int, row_bytes: int, most: int) -> int:
    """Returns in how many equal blocks rows pass, so that what one of them makes stays within `most` bytes.

    Examples:
      >>> equal_blocks(12, row_bytes=10, most=50), equal_blocks(7, row_bytes=10, most=50)
      (3, 7)
    """
    least = -(-n_rows * row_bytes // most)
    return next((n for n in range(max(least, 1), n_rows + 1) if n_rows % n == 0), 1)


def of(n_rows: int, n_latents: int) -> Partition:
    """Returns how the context mesh cuts `n_rows` rows and `n_latents` latents."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    manual = set() if mesh.empty else {
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Manual
    }  # fmt: skip

    def cut(axis: str, n: int) -> str | None:
        size = sizes.get(axis, 1)
        return axis if size > 1 and n % size == 0 and axis not in manual else None

    return Partition(rows=cut(DATA, n_rows), latents=cut(LATENT, n_latents))
