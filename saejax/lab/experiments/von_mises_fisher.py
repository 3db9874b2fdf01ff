"""Von Mises-Fisher sampler: latents on the unit sphere, and the mean that they must have.

It makes the data of the experiment `ident/vmf`. Everything is numpy in float64 on the host: the samples are the ground
truth.
"""

import numpy as np
from jaxtyping import Float
from scipy import special


def uniform(rng: np.random.Generator, rows: int, n: int) -> Float[np.ndarray, "rows n"]:
    """Draws rows uniformly from the unit sphere S^{n-1}."""
    z = rng.standard_normal((rows, n))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def mean_resultant_length(n: int, kappa: float) -> float:
    """E<v, z> of a von Mises-Fisher z around v: A_n(kappa) = I_{n/2}(kappa) / I_{n/2-1}(kappa).

    Source: Mardia & Jupp 2000, "Directional Statistics", section 9.3.2.

    Examples:
      >>> bool(np.isclose(mean_resultant_length(3, 2.0), 1 / np.tanh(2.0) - 1 / 2.0))  # Langevin's function on S^2
      True
    """
    return float(special.ive(n / 2, kappa) / special.ive(n / 2 - 1, kappa)) if kappa else 0.0


def cosines(rng: np.random.Generator, rows: int, n: int, kappa: float) -> Float[np.ndarray, "rows"]:
    """Draws w = <v, z>, whose density is proportional to exp(kappa w) (1 - w^2)^{(n-3)/2}, by exact rejection.

    The envelope is a Beta((n-1)/2, (n-1)/2) variable t seen through w = (1 - (1+b) t) / (1 - (1-b) t), which follows
    the target for any kappa: at least two of three proposals are accepted.

    Source: Wood 1994, "Simulation of the von Mises Fisher distribution".
    """
    b = (n - 1) / (2 * kappa + np.hypot(2 * kappa, n - 1))
    x0 = (1 - b) / (1 + b)
    log_bound = kappa * x0 + (n - 1) * np.log1p(-(x0**2))
    w, missing = np.empty(rows), np.arange(rows)
    while missing.size:
        t = rng.beta((n - 1) / 2, (n - 1) / 2, missing.size)
        proposal = (1 - (1 + b) * t) / (1 - (1 - b) * t)
        log_ratio = kappa * proposal + (n - 1) * np.log1p(-x0 * proposal) - log_bound
        accepted = np.log1p(-rng.random(missing.size)) <= log_ratio
        w[missing[accepted]] = proposal[accepted]
        missing = missing[~accepted]
    return w


def sample(rng: np.random.Generator, means: Float[np.ndarray, "rows n"], kappa: float) -> Float[np.ndarray, "rows n"]:
    """Draws z ~ vMF(v, kappa) for every unit row v: density proportional to exp(kappa <v, z>) on S^{n-1}, n >= 2."""
    rows, n = means.shape
    w = cosines(rng, rows, n, kappa)[:, None]
    tangent = rng.standard_normal((rows, n))
    tangent -= np.sum(tangent * means, axis=1, keepdims=True) * means
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return w * means + np.sqrt(np.maximum(1 - w**2, 0.0)) * tangent
