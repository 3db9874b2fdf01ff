"""Sparse codes of many signals over a fixed dictionary: saejax against scikit-learn on the same CPU.

Signals are sums of k atoms with noise. The two sides take turns on equal slices of the signals in one process, so
that whatever else the machine does hits both; printed are the summed times, the ratio, and how far the codes agree.
scikit-learn computes in float64, saejax in float32; each gets the form that suits it best, compilation is not timed.
orthogonal_mp_gram copies the Gram matrix for every signal, so `orthogonal_mp` is timed as well and may be the faster.

    python benchmarks/sparse_coding.py --signals 4096 --d 256 --n-atoms 4096 --k 16
"""

import argparse
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
import sklearn
from sklearn import linear_model

from saejax.sparse_coding import infer

Solver = Callable[[np.ndarray], np.ndarray]
SLICES = 4


def problem(n_signals: int, d: int, n_atoms: int, k: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns signals and unit atoms, float64, from a fixed seed."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(n_atoms, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((n_signals, n_atoms)), axis=1)[:, :k]
    amplitudes = rng.uniform(0.5, 1.5, (n_signals, k))
    return np.einsum("bk,bkd->bd", amplitudes, atoms[chosen]) + noise * rng.normal(size=(n_signals, d)), atoms


def timed(solvers: dict[str, tuple[Solver, int]], y: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns seconds per signal and codes of each solver; a solver may be limited to fewer signals."""
    seconds, codes = dict.fromkeys(solvers, 0.0), {name: [] for name in solvers}
    for part in np.array_split(y, SLICES):
        for name, (solve, limit) in solvers.items():
            rows = part[: max(limit // SLICES, 1)]
            start = time.perf_counter()
            codes[name].append(solve(rows))
            seconds[name] += time.perf_counter() - start
    counts = {name: sum(map(len, found)) for name, found in codes.items()}
    return {name: seconds[name] / counts[name] for name in solvers}, {n: np.concatenate(c) for n, c in codes.items()}


def pursuits(y: np.ndarray, atoms: np.ndarray, k: int, subset: int) -> None:
    """Orthogonal matching pursuit with k atoms, signed."""
    atoms32 = jax.device_put(atoms.astype(np.float32))
    gram = atoms @ atoms.T
    solvers: dict[str, tuple[Solver, int]] = {
        "saejax omp": (
            lambda rows: np.asarray(infer(rows.astype(np.float32), atoms32, method="omp", k=k, nonneg=False).dense()),
            len(y),
        ),
        "sklearn orthogonal_mp": (
            lambda rows: linear_model.orthogonal_mp(atoms.T, rows.T, n_nonzero_coefs=k).T,
            subset,
        ),
        "sklearn orthogonal_mp_gram": (
            lambda rows: linear_model.orthogonal_mp_gram(gram, atoms @ rows.T, n_nonzero_coefs=k).T,
            min(subset, 256),
        ),
    }
    solvers["saejax omp"][0](y[: -(-len(y) // SLICES)])
    seconds, codes = timed(solvers, y)
    report("OMP", seconds, len(y), {name: len(code) for name, code in codes.items()})
    per = len(y) // SLICES
    for name in list(codes)[1:]:
        n = len(codes[name]) // SLICES
        rows = np.concatenate([np.arange(s * per, s * per + n) for s in range(SLICES)])
        ours, theirs = codes["saejax omp"][rows], codes[name]
        same = np.mean(np.all((ours != 0) == (theirs != 0), axis=1))
        residuals = [np.linalg.norm(y[rows] - code @ atoms, axis=1).mean() for code in (ours, theirs)]
        print(
            f"  same support as {name}: {same:.4f} of the signals; "
            f"mean residual {residuals[0]:.6f} / {residuals[1]:.6f}"
        )


def lasso(y: np.ndarray, atoms: np.ndarray, l1_coef: float, tolerance: float, subset: int) -> None:
    """The Lasso to the same duality gap, signed: theirs in units of |y|^2, ours of |y|^2 / 2."""
    d = y.shape[1]
    atoms32 = jax.device_put(atoms.astype(np.float32))
    gram = atoms @ atoms.T

    def ours(rows: np.ndarray) -> np.ndarray:
        options = dict(l1_coef=l1_coef, nonneg=False, tolerance=2 * tolerance)
        solution = infer(rows.astype(np.float32), atoms32, method="fista", **options)
        assert bool(solution.converged.all())
        return np.asarray(solution.latents)

    def theirs(precompute: bool | np.ndarray) -> Solver:
        model = linear_model.Lasso(
            alpha=l1_coef / d, fit_intercept=False, tol=tolerance, max_iter=10_000, precompute=precompute
        )
        return lambda rows: np.atleast_2d(model.fit(atoms.T, rows.T).coef_)

    solvers: dict[str, tuple[Solver, int]] = {
        "saejax fista": (ours, len(y)),
        "sklearn Lasso": (theirs(False), subset),
        "sklearn Lasso, Gram given": (theirs(gram), subset),
    }
    ours(y[: -(-len(y) // SLICES)])
    seconds, codes = timed(solvers, y)
    report(
        f"Lasso, l1_coef={l1_coef}, gap <= {tolerance} |y|^2", seconds, len(y), {n: len(c) for n, c in codes.items()}
    )
    per = len(y) // SLICES
    for name in list(codes)[1:]:
        n = len(codes[name]) // SLICES
        rows = np.concatenate([np.arange(s * per, s * per + n) for s in range(SLICES)])
        values = [
            0.5 * np.sum((y[rows] - code @ atoms) ** 2, axis=1) + l1_coef * np.abs(code).sum(axis=1)
            for code in (codes["saejax fista"][rows].astype(float), codes[name])
        ]
        worst = np.max(np.abs(values[0] / values[1] - 1))
        print(
            f"  objective against {name}: "
            f"means {values[0].mean():.6f} / {values[1].mean():.6f}, worst ratio - 1 {worst:.1e}"
        )


def report(title: str, seconds: dict[str, float], n_signals: int, measured: dict[str, int]) -> None:
    """Prints one line per solver: time for all signals and the ratio to the first."""
    print(f"{title}; {n_signals} signals", flush=True)
    first = next(iter(seconds.values()))
    for name, per_signal in seconds.items():
        scaled = "" if measured[name] == n_signals else f"  (scaled from {measured[name]} signals)"
        print(f"  {name:28} {per_signal * n_signals:9.2f} s   x {per_signal / first:6.1f}{scaled}")


def cpu_name() -> str:
    """Returns the processor's name, or its architecture where the system does not tell."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Reads the sizes, names the machine, runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("signals", 4096), ("d", 256), ("n-atoms", 4096), ("k", 16), ("subset", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--l1-coef", type=float, default=0.1)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # scikit-learn's note on dependent atoms
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {load}; jax {jax.__version__}, sklearn {sklearn.__version__}")
    y, atoms = problem(args.signals, args.d, args.n_atoms, args.k, args.noise)
    pursuits(y, atoms, args.k, args.subset)
    lasso(y, atoms, args.l1_coef, args.tolerance, args.subset)


if __name__ == "__main__":
    main()
