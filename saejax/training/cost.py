r"""Modelled time of a step on chips that need not be here: products, the optimiser, rows of active latents, links.

.. math:: t = \frac{F}{n\,R} + \frac{4(3P + 2M)}{B} + \frac{4 \cdot 4\,b\,k\,d}{B} + \sum_c \frac{w_c S_c}{L}

F counts operations (`training.flops`) on n chips of R per second. P and M are the numbers of parameters and moments on
a chip; the optimiser reads gradients, and reads and writes the others. Four passes over the rows of active latents
(error, gradient of values, two gradients of weights) move b k d numbers each, of which a chip holds its share. A dense
code takes as many passes over [b, d_sae]. B is the bandwidth of memory and L that of the links. S_c is the bytes of a
collective, w_c = 2 for an all-reduce and 1 otherwise. The parts add up here; a chip that overlaps them is faster. No
clock has measured any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import jax

from saejax.parallel.targets import Chip
from saejax.sae import base
from saejax.training import flops
from saejax.training.program import Collective

_PASSES = 4


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step on each chip, by what they are for.

    Attributes:
      parts: name -> seconds.
      operations: of the step on all chips.
      peak: operations per second of all chips.
      rows: of the batch.
    """

    parts: dict[str, float]
    operations: float
    peak: float
    rows: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)

    def lines(self) -> list[str]:
        """What people read."""
        width = max(map(len, self.parts))
        rates = (
            f"{self.rows / self.seconds:,.0f} tokens/s, MFU {100 * self.operations / self.peak / self.seconds:.0f} %"
        )
        return [
            "time per step, modelled from bytes and rates (not measured)",
            *(f"  {name:<{width}}  {1e3 * part:>9.2f} ms" for name, part in self.parts.items()),
            f"  {'in all':<{width}}  {1e3 * self.seconds:>9.2f} ms: {rates}; the largest part is {self.limit}",
        ]


def of(
    sparsifier: base.Sparsifier,
    batch: int,
    mesh: dict[str, int],
    chip: Chip,
    exchanged: Iterable[Collective],
    *,
    members: int = 1,
) -> Time:
    """The modelled time of a step.

    Args:
      sparsifier: the architecture.
      batch: rows per step, over all chips.
      mesh: chips along `data` and `latent`.
      chip: their kind.
      exchanged: collectives of a step, of a compiled program or of `exchanges`; AuxK's are left out.
      members: of an ensemble on each chip, which all see the batch.
    """
    n_data, n_latent = mesh["data"], mesh["latent"]
    n_params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(sparsifier.init, jax.random.key(0)))) / n_latent
    width = sparsifier.d_in + sparsifier.d_out
    active = sparsifier.n_active
    if active is None or not sparsifier.k_sparse:
        moved = _PASSES * 4 * batch / n_data * sparsifier.d_sae / n_latent
    else:
        moved = _PASSES * 4 * batch / n_data * active / n_latent * width / 2
    operations = members * flops.per_step(sparsifier, batch)
    sent = sum((2 if one.kind == "all-reduce" else 1) * one.n_bytes for one in exchanged if not one.of_aux_k)
    parts = {
        "products": operations / (n_data * n_latent * chip.flops),
        "optimiser": members * 4 * (3 * n_params + 2 * 2 * n_params) / chip.bandwidth,
        "active rows": members * moved / chip.bandwidth,
        "links": sent / chip.links,
    }
    return Time(parts, operations, n_data * n_latent * chip.flops, batch)


def exchanges(sparsifier: base.Sparsifier, batch: int, mesh: dict[str, int]) -> Iterator[Collective]:
    """The collectives that a step must make on a mesh, from shapes alone.

    Along `data` the gradients of the weights. Along `latent` the candidates of top-k and the decoded sums.
    """
    n_data, n_latent = mesh["data"], mesh["latent"]
    here = batch // n_data
    if n_data > 1:
        params = jax.eval_shape(sparsifier.init, jax.random.key(0))
        yield Collective("all-reduce", ("data",), 4 * (params.W_enc.size + params.W_dec.size) // n_latent, False)
    if n_latent > 1:
        yield Collective("all-reduce", ("latent",), 4 * here * sparsifier.d_out, False)
        if sparsifier.k_sparse and sparsifier.n_active:
            yield Collective("all-gather", ("latent",), 8 * here * sparsifier.n_active * n_latent, False)
            yield Collective("all-reduce", ("latent",), 4 * here * sparsifier.n_active, False)


def meshes(
    sparsifier: base.Sparsifier, batch: int, chip: Chip, n_devices: int, n_lanes: int
) -> dict[tuple[int, int], Time]:
    """The modelled time on every mesh (data, latent) of so many chips, fastest first."""
    found = {}
    for n_latent in (n for n in range(1, n_devices + 1) if n_devices % n == 0):
        n_data = n_devices // n_latent
        if n_lanes % n_data == 0 and sparsifier.d_sae % n_latent == 0:
            mesh = {"data": n_data, "latent": n_latent}
            found[n_data, n_latent] = of(sparsifier, batch, mesh, chip, exchanges(sparsifier, batch, mesh))
    return dict(sorted(found.items(), key=lambda item: item[1].seconds))
