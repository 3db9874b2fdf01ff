"""E3, shrinkage: the cost of an L1 penalty. Relative reconstruction bias against closed forms, and the knee.

There are two settings. Over an orthonormal dictionary every code is soft-thresholded, so the bias has a closed form;
an oracle and trained SAEs are compared with it. The benchmark SB-iid, in superposition, has none: the sweep shows bias
and reconstruction against the penalty, and where the latter begins to spike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.activations.synthetic import Synthetic
from saejax.errors import UserError
from saejax.evals import evaluate, knee, metric, recovery, shrinkage
from saejax.lab.experiments import figures, fit, harness, soft_threshold
from saejax.lab.metrics import over
from saejax.sae import L1, base, model
from saejax.sparse_coding import infer

REFERENCE = "independent NumPy reference run"
TOLERANCE = 0.004


@harness.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class KneeAndShrinkage(harness.Experiment):
    """Shrinkage grows with the penalty, by the amount that the closed forms say, and reconstruction has a knee."""

    name = "synth/l1_knee_shrinkage"
    summary = "L1: shrinkage against closed forms, oracle and trained; the knee of a sweep of the penalty"
    cpu_seconds = (300, 50)

    d: int = 32
    """Width, and number of orthonormal features, of the first setting."""
    firing_rate: float = 0.05
    """Probability that a feature fires in the first setting, in (0, 1)."""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """Levels t at which the oracle is soft-thresholded."""
    trained: tuple[str, ...] = ("constant 1 0.2", "Exp(1) 0.2", "Exp(1) 0.4", "Exp(1) 0.8", "U[0, 1] 0.2")
    """Trained SAEs, each as "distribution of amplitudes, penalty" (penalty = 2 t)."""
    n_tokens_orthonormal: int = 4_096_000
    """Rows that each SAE of the first setting is trained on."""
    l1_coefs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Penalties of the sweep, rising by a constant factor."""
    n_tokens: int = 3_072_000
    """Rows that each SAE of the sweep is trained on."""
    n_seeds: int = 2
    """Trainings per penalty of the sweep (>= 2): the bootstrap of the knee draws among them."""
    eval_rows: int = 20_000
    """Held-out rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.firing_rate < 1:
            raise UserError(f"firing_rate = {self.firing_rate}: a probability inside (0, 1) is needed")
        if not all(0 < t < 1 for t in self.thresholds):
            raise UserError(f"thresholds = {self.thresholds}: levels inside (0, 1) are needed")
        if self.n_seeds < 2 or len(self.l1_coefs) < 3 or min(self.l1_coefs) <= 0:
            raise UserError(
                f"l1_coefs = {self.l1_coefs}, n_seeds = {self.n_seeds}: 3 or more penalties above 0 and 2 or more "
                "seeds are needed for a knee"
            )
        for arm in self.trained:
            name, _, penalty = arm.rpartition(" ")
            if name not in soft_threshold.QUANTILES or not penalty.replace(".", "", 1).isdigit():
                allowed = ", ".join(soft_threshold.QUANTILES)
                raise UserError(f"trained = {arm!r}: a distribution ({allowed}) and a penalty are needed")

    def quick(self):
        """Two trained SAEs, and a shorter sweep of five penalties."""
        return dataclasses.replace(
            self,
            trained=("constant 1 0.2", "Exp(1) 0.4"),
            n_tokens_orthonormal=2_048_000,
            l1_coefs=(0.1, 0.2, 0.4, 0.8, 1.6),
            n_tokens=512_000,
        )

    def run(self) -> harness.Outcome:
        """Oracle, trained SAEs, sweep."""
        oracle = {name: self._oracle(name) for name in soft_threshold.QUANTILES}
        trained = {arm: self._trained(*arm.rsplit(" ", 1)) for arm in self.trained}
        sweep = self._sweep()
        values = {"oracle": oracle, "trained": trained, "sweep": sweep}
        checks = _oracle_checks(oracle) + _trained_checks(trained) + self._sweep_checks(sweep)
        return harness.Outcome(values, checks, _figure(values))

    def _basis(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        return np.linalg.qr(rng.standard_normal((self.d, self.d)))[0].T.astype(np.float32)

    def _oracle(self, name: str) -> dict[str, Any]:
        """Gamma of the true dictionary with codes from FISTA, whose half-loss thresholds at its coefficient."""
        basis = self._basis()
        y, _ = soft_threshold.rows(name, basis, self.eval_rows * 2, self.firing_rate, self.seed + 1)
        found = []
        for t in self.thresholds:
            codes = infer(jnp.asarray(y), jnp.asarray(basis), method="fista", l1_coef=t).dense()
            found.append(_gamma(y, np.asarray(codes) @ basis))
        return {
            "t": self.thresholds,
            "gamma": found,
            "closed_form": [soft_threshold.oracle_bias(name, t) for t in self.thresholds],
        }

    def _trained(self, name: str, penalty: str) -> dict[str, float]:
        """Gamma and the bias of the codes of a trained SAE, over the features that it found."""
        basis, t = self._basis(), float(penalty) / 2
        y, _ = soft_threshold.rows(name, basis, 262_144, self.firing_rate, self.seed + 2)
        sparsifier = L1(d_in=self.d, d_sae=self.d, l1_coef=2 * t, decoder_init_norm=1.0)
        sae = fit.train(sparsifier, y, n_tokens=self.n_tokens_orthonormal, seed=self.seed)
        fresh, codes = soft_threshold.rows(name, basis, self.eval_rows, self.firing_rate, self.seed + 3)
        match = recovery.dictionary_recovery(np.asarray(sae.params.W_dec), basis, n_chance=1)
        # A feature that a local minimum has lost says nothing about the penalty.
        kept = np.flatnonzero(np.asarray(match["match_cos"]) > 0.9)
        gamma = _gamma(fresh @ basis[kept].T, np.asarray(sae(jnp.asarray(fresh))) @ basis[kept].T)
        p = self.firing_rate
        return {
            "gamma": gamma,
            "closed_form": soft_threshold.trained_bias(name, t, p),
            "closed_form_without_decoder_bias": soft_threshold.oracle_bias(name, t),
            "features_kept": len(kept),
            "code_bias": _code_bias(sae, fresh, codes[:, kept], np.asarray(match["match"])[kept]),
            "code_bias_closed_form": t + soft_threshold.decoder_bias(name, t, p),
        }

    def _sweep(self) -> dict[str, Any]:
        """Held-out figures per penalty and seed on SB-iid, and the knee of the mean curve."""
        source = Synthetic()
        keys = ("fvu", "l0", "relative_reconstruction_bias", "l2_ratio", "mcc")
        table: dict[str, list[list[float]]] = {key: [] for key in keys}
        for seed in range(self.seed, self.seed + self.n_seeds):
            results = []
            for coef in self.l1_coefs:
                sparsifier = L1(d_in=source.d_in, d_sae=source.n_features, l1_coef=coef)
                sae = fit.train(sparsifier, source, n_tokens=self.n_tokens, seed=seed)
                results.append(evaluate.evaluate(sae, source, max_rows=self.eval_rows))
            for key in keys:
                table[key].append([float(result[key]) for result in results])
        log_coef = np.log2(self.l1_coefs)
        runs = np.array(table["fvu"])
        found = knee.knee(log_coef, runs, seed=self.seed)
        alone = [int(knee.knee(log_coef, run)["knee_index"]) for run in runs]
        return {"l1_coef": self.l1_coefs, **table, "knee": found, "knee_index_per_seed": alone}

    def _sweep_checks(self, sweep: dict[str, Any]) -> list[harness.Check]:
        gammas = np.mean(sweep["relative_reconstruction_bias"], axis=0)
        found, step = sweep["knee"], np.log2(self.l1_coefs[1] / self.l1_coefs[0])
        interval = max(found["knee_x_high"] - found["knee_x"], found["knee_x"] - found["knee_x_low"]) / step
        spread = max(abs(i - found["knee_index"]) for i in sweep["knee_index_per_seed"])
        return [
            harness.Check(
                quantity="largest step of gamma as the penalty rises",
                measured=float(np.diff(gammas).max()),
                high=0.0,
                source="shrinkage grows with the penalty",
            ),
            harness.Check(
                quantity="knee: bootstrap interval to either side (grid steps)",
                measured=float(interval),
                high=1.0,
                source="proposed with the experiment: stable to one step",
            ),
            harness.Check(
                quantity="knee: distance of single seeds (grid steps)",
                measured=float(spread),
                high=1.0,
                source="proposed with the experiment: stable to one step",
            ),
        ]


def _gamma(y: np.ndarray, recon: np.ndarray) -> float:
    """Relative reconstruction bias of rows and their reconstructions, by the metric that evaluation uses."""
    n, d = y.shape
    batch = metric.EvalBatch(
        x=jnp.asarray(y),
        recon=jnp.asarray(recon),
        encoding=base.Encoding(latents=jnp.zeros((n, 1)), d_sae=1),
        weight=jnp.ones(n),
        W_dec=jnp.zeros((1, d)),
        b_dec=jnp.zeros(d),
    )
    return over.over(shrinkage.Norms(), batch)["relative_reconstruction_bias"]


def _code_bias(sae: model.SAE, y: np.ndarray, codes: np.ndarray, match: np.ndarray) -> float:
    """Mean of z - z_hat where a feature fires and its latent does, latents in units of the data."""
    norms = np.linalg.norm(np.asarray(sae.params.W_dec), axis=1)
    latents = (np.asarray(sae.encode(jnp.asarray(y))) * norms)[:, match]
    both = (codes > 0) & (latents > 0)
    return float((codes - latents)[both].mean())


def _oracle_checks(oracle: dict[str, Any]) -> list[harness.Check]:
    return [
        harness.Check(
            quantity=f"gamma, oracle, {name}: largest distance over t",
            measured=float(np.abs(np.subtract(found["gamma"], found["closed_form"])).max()),
            high=TOLERANCE,
            source="closed form of the soft threshold",
        )
        for name, found in oracle.items()
    ]


def _trained_checks(trained: dict[str, Any]) -> list[harness.Check]:
    checks = []
    for arm, found in trained.items():
        name, penalty = arm.rsplit(" ", 1)
        told = f"trained L1, {name}, penalty {penalty}"
        source = "closed form with the trainable decoder bias"
        checks.append(harness.near(f"gamma, {told}", found["gamma"], found["closed_form"], TOLERANCE, source))
        checks.append(
            harness.Check(
                quantity=f"features found of 32, {told}",
                measured=found["features_kept"],
                low=30,
                source=f"{REFERENCE}: 31 or 32",
            )
        )
        if name == "constant 1":
            checks.append(
                harness.near(
                    f"bias of active codes, {told}",
                    found["code_bias"],
                    found["code_bias_closed_form"],
                    TOLERANCE,
                    "t / (1 - p)",
                )
            )
    return checks


def _figure(values: dict[str, Any]) -> Any:
    figure, (left, middle, right) = figures.new(1, 3, width=4.0)
    for i, (name, found) in enumerate(values["oracle"].items()):
        figures.line(left, found["t"], found["closed_form"], i, marker=False)
        figures.line(left, found["t"], found["gamma"], i, name, linestyle="none")
    figures.finish(
        left, x="threshold t (units of the data)", y="gamma", title="Oracle; lines: closed form", legend=True
    )
    left.set_xscale("log", base=2)
    trained = values["trained"]
    at = np.arange(len(trained))
    forms = {"gamma": "trained SAE", "closed_form": "closed form", "closed_form_without_decoder_bias": "without b_dec"}
    for i, (key, label) in enumerate(forms.items()):
        figures.line(
            middle, at + 0.12 * (i - 1), [found[key] for found in trained.values()], i, label, linestyle="none"
        )
    middle.set_xticks(at, [arm.rsplit(" ", 1)[0] + "\npenalty " + arm.rsplit(" ", 1)[1] for arm in trained])
    middle.margins(x=0.2)
    figures.finish(middle, x="", y="gamma", title="Trained L1, orthonormal features", legend=True)
    sweep = values["sweep"]
    for i, (key, label) in enumerate({"fvu": "FVU", "relative_reconstruction_bias": "gamma", "mcc": "MCC"}.items()):
        runs = np.array(sweep[key])
        figures.line(right, sweep["l1_coef"], runs.mean(0), i, label, spread=runs.std(0))
    if sweep["knee"]["knee_index"] >= 0:
        right.axvline(2 ** sweep["knee"]["knee_x"], color="0.35", linewidth=0.9, linestyle=(0, (2, 2)))
        right.axvspan(2 ** sweep["knee"]["knee_x_low"], 2 ** sweep["knee"]["knee_x_high"], color="0.85", zorder=0)
    right.set_xscale("log", base=2)
    figures.finish(right, x="penalty (units of the data)", y="score", title="SB-iid; dashed: knee", legend=True)
    return figure
