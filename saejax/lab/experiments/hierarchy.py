"""Absorption on a hierarchy: a child's latent takes over its parent's direction, and the parent's falls silent.

On SB-hier a child never fires without its parent, so a sparser code lets the child's latent stand for both. Sparse
coding with a learnt dictionary finds it too. So sparsity itself asks for absorption, and absorption is always read
beside L0.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from saejax.activations.synthetic import Kind, Synthetic
from saejax.evals import recovery
from saejax.lab.experiments import figures, fit
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register
from saejax.lab.experiments.known_codes import DROP_BELOW, Dictionary, scores
from saejax.lab.metrics import absorption
from saejax.lab.metrics.over import over
from saejax.sae import L1, TopK, matryoshka
from saejax.sparse_coding import learning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "independent NumPy reference run"
PAPER = "Chanin et al. 2024"

Coded = tuple[np.ndarray, float]
"""Codes [b, n] and the share of rows on which their solver did not converge."""


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy(Experiment):
    """Absorption and recovery of TopK, Matryoshka, L1 and sparse coding, beside the true dictionary."""

    name: ClassVar[str] = "synth/sb_hier"
    summary: ClassVar[str] = "parents and children: how often a parent's latent is off while its child is on"
    cpu_seconds: ClassVar[tuple[int, int]] = (70, 28)

    n_steps: int = 6000
    """Training steps of each SAE, 512 rows each (>= 1)."""
    n_learning_steps: int = 400
    """Steps of dictionary learning, 512 rows each (>= 1)."""
    n_test: int = 4000
    """Held-out rows (>= 2)."""
    with_controls: bool = True
    """Also train the L1 SAE and learn a dictionary."""

    def quick(self) -> Self:
        return dataclasses.replace(self, n_steps=2500, n_test=3000, with_controls=False)

    def run(self) -> Outcome:
        source = Synthetic(kind=Kind.hierarchical)
        rows, codes = next(source.heldout_with_codes(self.n_test, self.n_test))
        features = source.features()
        oracle = Dictionary.of(features, features)
        # The first 32 latents, as many as there are parents, must reconstruct alone.
        nested = matryoshka.Matryoshka(
            d_in=source.d_in,
            d_sae=source.n_features,
            k=3,
            selection=matryoshka.Selection.topk,
            prefixes=(source.n_groups, source.n_features),
        )
        found = {
            "true, matched filter": (oracle, oracle.codes(rows, "top_k", k=4)),
            "true, OMP": (oracle, oracle.codes(rows, "omp", k=8, drop=DROP_BELOW)),
            "TopK": self._sae(TopK(d_in=source.d_in, d_sae=source.n_features, k=3, k_aux=32), source, rows),
            "Matryoshka": self._sae(nested, source, rows),
        }
        if self.with_controls:
            l1 = L1(d_in=source.d_in, d_sae=source.n_features, l1_coef=0.1, decoder_init_norm=1.0)
            found |= {"L1": self._sae(l1, source, rows), "dictionary learning": self._learnt(source, rows)}
        arms = {
            name: _scored(source, codes, z, dictionary) | {"unconverged": unconverged}
            for name, (dictionary, (z, unconverged)) in found.items()
        }
        return Outcome(values={"arms": arms}, checks=_checks(arms), figure=_figure(arms))

    def _sae(self, architecture: Any, source: Synthetic, rows: np.ndarray) -> tuple[Dictionary, Coded]:
        """An SAE's decoder and the codes of its encoder, which has nothing to converge."""
        sae = fit.train(architecture, source, n_tokens=512 * self.n_steps, seed=self.seed)
        return Dictionary.of_sae(sae, source.features()), (np.asarray(sae.encode(jnp.asarray(rows))), 0.0)

    def _learnt(self, source: Synthetic, rows: np.ndarray) -> tuple[Dictionary, Coded]:
        """A learnt dictionary and the codes of FISTA."""
        n_rows = 512 * self.n_learning_steps
        stream = source.open(n_lanes=1, block_rows=n_rows, lanes=range(1), seed=self.seed, prefetch=1)
        signals = jnp.asarray(next(stream)[0])
        found = learning.learn(signals, source.n_features, l1_coef=0.1, n_steps=self.n_learning_steps, seed=self.seed)
        dictionary = Dictionary.of(found.dictionary, source.features())
        return dictionary, dictionary.codes(rows, "fista", l1_coef=0.1)


def _scored(source: Synthetic, codes: np.ndarray, found: np.ndarray, dictionary: Dictionary) -> dict[str, float]:
    """Recovery of directions and codes, and absorption with parents matched by direction."""
    parents = source.parents()
    roots = np.flatnonzero(parents < 0)
    child = np.stack([(codes[:, parents == root] > 0).any(axis=1) for root in roots], axis=1)
    match = dictionary.match[roots]
    latent = np.where(match[None, :] >= 0, found[:, match], 0.0)
    batch = absorption.FamilyBatch(
        parent=jnp.asarray(codes[:, roots] > 0), child=jnp.asarray(child), latent=jnp.asarray(latent, jnp.float32)
    )
    directions = recovery.dictionary_recovery(dictionary.rows, source.features())
    return {
        **scores(codes, found, dictionary.match),
        **{key: float(directions[key]) for key in ("mcc", "mcc_chance", "recovered_features")},
        **over(absorption.ParentAbsorption(), batch),
    }


def _checks(arms: dict[str, dict[str, float]]) -> list[Check]:
    topk, nested = arms["TopK"], arms["Matryoshka"]
    checks = [
        near("absorption, true dictionary, matched filter",
             arms["true, matched filter"]["absorption"], 0.297, 0.05, RUN),
        Check(quantity="absorption, true dictionary, OMP", measured=arms["true, OMP"]["absorption"], high=0.05,
              source=f"{RUN}: .017"),
        Check(quantity="absorption, TopK", measured=topk["absorption"], low=0.55, source=f"{RUN}: .715; {PAPER}"),
        Check(quantity="missed alone, TopK (the control)", measured=topk["missed_alone"], expected=".339", source=RUN),
        Check(quantity="recovered features (cos > .9), TopK", measured=topk["recovered_features"],
              expected=".121", source=RUN),
        Check(quantity="absorption, Matryoshka - TopK", measured=nested["absorption"] - topk["absorption"],
              high=-0.12, source=f"{RUN}: .489 - .715"),
        Check(quantity="recovered features, Matryoshka - TopK",
              measured=nested["recovered_features"] - topk["recovered_features"], low=0.2,
              source=f"{RUN}: .500 - .121"),
        Check(quantity="missed alone, Matryoshka (the control)", measured=nested["missed_alone"], expected=".296",
              source=RUN),
    ]  # fmt: skip
    if "L1" in arms:
        l1, learnt = arms["L1"], arms["dictionary learning"]
        checks += [
            Check(quantity="absorption, L1 at an L0 far above the true 3.3", measured=l1["absorption"], high=0.15,
                  source=f"{RUN}: .027 at L0 11.6"),
            Check(quantity="L0, L1", measured=l1["l0"], expected="11.6", source=RUN),
            Check(quantity="absorption, dictionary learning, FISTA", measured=learnt["absorption"],
                  expected=".252", source=RUN),
            near("code MCC, dictionary learning, FISTA", learnt["code_mcc"], 0.979, 0.03, RUN),
        ]  # fmt: skip
    return checks


def _figure(arms: dict[str, dict[str, float]]) -> Figure:
    figure, axes = figures.new(1, 2, width=1.2 + 1.1 * len(arms), height=3.4)
    names = [f"{name.replace(', ', chr(10)).replace(' ', chr(10))}\nL0 {v['l0']:.1f}" for name, v in arms.items()]
    rates = [[v[key] for v in arms.values()] for key in ("absorption", "missed_alone")]
    figures.bars(axes[0], names, rates, series=("parent and child on", "parent alone (control)"))
    axes[0].set_ylim(0, 1.2)
    figures.finish(axes[0], x="", y="share with the parent's latent off", title="absorption", legend=True)
    values = [[v[key] for v in arms.values()] for key in ("recovered_features", "f1")]
    figures.bars(axes[1], names, values, series=("features with cos > 0.9", "support F1"))
    axes[1].set_ylim(0, 1.35)
    figures.finish(axes[1], x="", y="share, F1 (0 to 1)", title="recovery", legend=True)
    return figure
