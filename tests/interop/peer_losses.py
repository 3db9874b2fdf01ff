"""Loss terms and their gradients, ours and those of an installed package, from the same weights and rows.

A trainer of a package is given our parameters leaf by leaf (LEAVES says which of its tensors is which), and its
gradients come back under our names.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae

torch = pytest.importorskip("torch")

D_IN, D_SAE, K, ROWS, STEP, WARMUP = 8, 24, 4, 48, 3, 10
SIZES = {"d_in": D_IN, "d_sae": D_SAE}
WARM = STEP / WARMUP
TOLERANCE = 1e-5
"""Largest difference over the largest entry, of values and of the gradient of each leaf: some 100 roundings."""

LEAVES = {
    "W_enc": ("W_enc", "encoder.weight"),
    "b_enc": ("b_enc", "b_gate", "encoder.bias", "gate_bias"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_dec": ("b_dec", "bias", "decoder.bias", "decoder_bias"),
    "threshold": ("threshold",),
    "r_mag": ("r_mag",),
    "b_mag": ("b_mag", "mag_bias"),
}
"""Names of each of our leaves in the packages; an `.weight` of a linear layer is transposed."""


_RNG = np.random.default_rng(3)
THRESHOLD = {"threshold": 0.2 + 0.4 * _RNG.random(D_SAE)}
GATES = {"r_mag": 0.3 * _RNG.standard_normal(D_SAE), "b_mag": 0.1 * _RNG.standard_normal(D_SAE)}
"""Further leaves of the architectures that have them."""


def needs(*packages):
    """A mark: skip the test, before it computes anything, where a package is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


Terms = dict[str, tuple[float, dict[str, np.ndarray]]]
"""Value and gradients of every term, by name."""


def _rows():
    """Centred rows with E||x||^2 = 1, so that their variance is 1."""
    x = np.random.default_rng(0).standard_normal((ROWS, D_IN))
    x = x - x.mean(0)
    return (x / np.sqrt(np.mean(np.sum(x**2, axis=1)))).astype(np.float32)


X = _rows()
_SOON = np.array([2, 5, 11, 12, 17, 23])
_ORDER = np.concatenate([_SOON, np.setdiff1d(np.arange(D_SAE), _SOON)])


def mask(n_dead):
    """Which latents count as dead."""
    return np.isin(np.arange(D_SAE), _ORDER[:n_dead])


def weights(n_dead=0, *, unit=True, **extra):
    """Parameters as in training; dead latents have small pre-activations, positive on every row of X."""
    rng, dead = np.random.default_rng(1), mask(n_dead)

    def directions():
        rows = rng.standard_normal((D_SAE, D_IN))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    W_dec = directions() * (1.0 if unit else np.linspace(0.5, 2, D_SAE)[:, None])
    gain = np.where(dead, 0.02, 3.0)
    b_enc = np.where(dead, 0.06 + 0.02 * rng.random(D_SAE), 0.1 * rng.standard_normal(D_SAE))
    arrays = {"W_enc": (directions() * gain[:, None]).T, "b_enc": b_enc, "W_dec": W_dec}
    arrays |= {"b_dec": 0.1 * rng.standard_normal(D_IN)}
    arrays, extra = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (arrays, extra))
    return sae.SAEParams(**arrays, extra=extra)


def flat(params):
    """Every leaf by name."""
    return {name: getattr(params, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | params.extra


def ours(config, params, n_dead=0, x=X) -> Terms:
    """Terms of `config.loss`, with "loss" their weighted sum; after STEP steps."""

    def terms(params):
        loss, aux = config.loss(params, jnp.asarray(x), dead=jnp.asarray(mask(n_dead)), step=jnp.asarray(STEP))
        return aux.terms | {"loss": loss}

    values, grads = jax.jit(lambda p: (terms(p), jax.jacrev(terms)(p)))(params)
    return {name: (float(values[name]), {k: np.asarray(g) for k, g in flat(grads[name]).items()}) for name in values}


def residual_variance(config, params, x=X):
    """E||e - mean e||^2 of the residual e: what AuxK is divided by."""
    _, aux = config.loss(params, jnp.asarray(x), dead=jnp.zeros(D_SAE, bool), step=jnp.asarray(STEP))
    residual = np.asarray(x - aux.recon, np.float64)
    return float(np.mean(np.sum((residual - residual.mean(0)) ** 2, axis=1)))


def leaves(module) -> dict[str, tuple[Any, bool]]:
    """Tensors of a module by our names, and whether they are transposed."""
    tensors = dict(module.named_parameters())
    found = {name: [n for n in known if n in tensors] for name, known in LEAVES.items()}
    linear = {name: names[0].endswith(".weight") for name, names in found.items() if names}
    # sparsify alone has a linear encoder and a decoder of our shape; shapes cannot mislead, as d_in != d_sae.
    return {name: (tensors[found[name][0]], is_linear) for name, is_linear in linear.items()}


def filled(module, params):
    """The module with our parameters."""
    given, taken = flat(params), leaves(module)
    assert set(taken) <= set(given), (sorted(taken), sorted(given))
    with torch.no_grad():
        for name, (tensor, transposed) in taken.items():
            value = torch.from_numpy(np.array(given[name]))
            tensor.copy_(value.T if transposed else value)
    return module


def terms_of(losses, module) -> Terms:
    """Values and gradients of a package's losses."""
    tensors = leaves(module)
    found = {}
    for name, loss in losses.items():
        grads = [None] * len(tensors)
        if loss.requires_grad:
            wanted = [tensor for tensor, _ in tensors.values()]
            grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        by_name = {}
        for (leaf, (tensor, transposed)), grad in zip(tensors.items(), grads, strict=True):
            grad = (torch.zeros_like(tensor) if grad is None else grad).numpy()
            by_name[leaf] = grad.T if transposed else grad
        found[name] = float(loss.detach()), by_name
    return found


def saelens(architecture, params, n_dead=0, x=X, coefficients=None, **fields):
    """Terms of a SAELens training SAE: its `losses`, and "loss". Returns them and the SAE."""
    registry, sae_lens = pytest.importorskip("sae_lens.registry"), pytest.importorskip("sae_lens.saes.sae")
    kind, config = registry.get_sae_training_class(architecture)
    module = filled(kind(config(**SIZES, **fields)), params)
    given = sae_lens.TrainStepInput(
        sae_in=torch.from_numpy(x),
        coefficients=coefficients or {},
        dead_neuron_mask=torch.from_numpy(mask(n_dead)),
        n_training_steps=STEP,
        is_logging_step=False,
    )
    out = module.training_forward_pass(given)
    return terms_of(out.losses | {"loss": out.loss}, module), module


def trainer(name, params, n_dead=0, **fields):
    """A trainer of dictionary_learning with our parameters, at a time when `n_dead` latents count as dead."""
    files = ("standard", "p_anneal", "gdm", "top_k", "batch_top_k", "jumprelu", "matryoshka_batch_top_k")
    modules = [pytest.importorskip(f"dictionary_learning.trainers.{file}") for file in files]
    kind = next(getattr(module, name) for module in modules if hasattr(module, name))
    common = {"steps": 100, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "none", "device": "cpu"}
    made = kind(**common, **{"warmup_steps": 0} | fields)
    filled(made.ae, params)
    if hasattr(made, "num_tokens_since_fired"):
        made.num_tokens_since_fired[torch.from_numpy(mask(n_dead))] = made.dead_feature_threshold
    return made


def dictionary_learning(made, x=X) -> Terms:
    """Its "loss", with gradients, and the logged terms, whose gradients it does not give."""
    rows = torch.from_numpy(x)
    terms = terms_of({"loss": made.loss(rows, step=STEP)}, made.ae)
    logged = made.loss(rows, step=STEP, logging=True)
    if hasattr(logged, "losses"):
        terms = {name: (value, {}) for name, value in logged.losses.items()} | terms
    return terms


def agree(mine, theirs, *, factor=1.0, without=()):
    """One term: value and gradients of all leaves that both have, but `without`; theirs times `factor`."""
    apart = {"value": abs(mine[0] - factor * theirs[0]) / abs(mine[0])}
    for leaf in sorted(mine[1].keys() & theirs[1].keys() - set(without)):
        a, b = mine[1][leaf], factor * theirs[1][leaf]
        largest = np.abs(a).max()
        apart[leaf] = np.abs(a - b).max() / largest if largest else np.abs(b).max()
    print(" ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    assert max(apart.values()) <= TOLERANCE, apart


def norms(term):
    """Norms of the gradients of a term."""
    return {leaf: float(np.linalg.norm(grad)) for leaf, grad in term[1].items()}
