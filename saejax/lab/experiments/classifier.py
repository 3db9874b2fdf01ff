"""Small networks: a fixed one that hides the latents, and trained classifiers, for several experiments.

`MLP` and `Classifier` are static descriptions with pure methods; `minimise` runs a whole training as one jitted
`lax.scan`. The experiments on identifiability and additivity use them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

Params = list[dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """A multi-layer perceptron: static, hashable, its parameters kept apart."""

    widths: tuple[int, ...]
    """Units of every layer, from the input to the output."""
    slope: float = 0.0
    """Slope of the hidden units below zero: 0 is ReLU, else leaky ReLU."""
    glorot: bool = False
    """Whether weights and biases start within sqrt(6 / (fan_in + fan_out)), as in scikit-learn, instead of
    sqrt(1 / fan_in), as in PyTorch."""

    def init(self, key: jax.Array) -> Params:
        """Draws weights and biases uniformly from one interval per layer; see `glorot`."""
        params = []
        for n_in, n_out in zip(self.widths[:-1], self.widths[1:], strict=True):
            key, key_w, key_b = jax.random.split(key, 3)
            bound = (6 / (n_in + n_out)) ** 0.5 if self.glorot else n_in**-0.5
            W = jax.random.uniform(key_w, (n_in, n_out), minval=-bound, maxval=bound)
            params.append({"W": W, "b": jax.random.uniform(key_b, (n_out,), minval=-bound, maxval=bound)})
        return params

    def pre_acts(self, params: Params, x: Float[Array, "b d_in"]) -> list[Float[Array, "b width"]]:
        """Returns what every layer computes before its nonlinearity; the last is the output."""
        layers: list[jax.Array] = []
        for layer in params:
            h = jax.nn.leaky_relu(layers[-1], self.slope) if layers else x
            layers.append(h @ layer["W"] + layer["b"][None, :])
        return layers

    def __call__(self, params: Params, x: Float[Array, "b d_in"]) -> Float[Array, "b d_out"]:
        """Returns the output, which no nonlinearity follows."""
        return self.pre_acts(params, x)[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """An encoder f and one weight vector per class: logits W f(x), without bias, as the theorem has it."""

    encoder: MLP
    """Its output is the representation."""
    n_classes: int
    """At least 2."""
    unit_norm: bool = False
    """Whether the representation is scaled to length 1."""

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the parameters {"encoder", "W" [n_classes, d]}; class vectors have expected length 1."""
        key_f, key_w = jax.random.split(key)
        d = self.encoder.widths[-1]
        return {"encoder": self.encoder.init(key_f), "W": jax.random.normal(key_w, (self.n_classes, d)) * d**-0.5}

    def representation(self, params: dict[str, Any], x: Float[Array, "b d_in"]) -> Float[Array, "b d"]:
        """Returns f(x)."""
        h = self.encoder(params["encoder"], x)
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True) if self.unit_norm else h

    def logits(self, params: dict[str, Any], x: Float[Array, "b d_in"]) -> Float[Array, "b n_classes"]:
        """Returns W f(x)."""
        return self.representation(params, x) @ params["W"].T

    def loss(self, params: dict[str, Any], rows: tuple[jax.Array, jax.Array]) -> Float[Array, ""]:
        """Returns the mean cross-entropy of (x [b, d_in], labels [b]), in nats."""
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(self.logits(params, rows[0]), rows[1]))


def mixing(rng: np.random.Generator, z: Float[np.ndarray, "rows n"], *, depth: int = 4) -> Float[np.ndarray, "rows n"]:
    """Mixing map from latents to the classifier's input: x = g(z), injective and far from linear.

    g is `depth` random orthogonal maps, each followed by leaky-ReLU of slope 0.2, times 1.5. Four of them leave a
    linear map from x to z an R2 of about 0.7; with a milder g the experiments would prove nothing.
    """
    n = z.shape[1]
    x = np.asarray(z, np.float64)
    for _ in range(depth):
        x = x @ np.linalg.qr(rng.standard_normal((n, n)))[0]
        x = 1.5 * np.where(x > 0, x, 0.2 * x)
    return x


@dataclasses.dataclass(frozen=True)
class Trained:
    """A classifier before and after its training."""

    model: Classifier
    start: dict[str, Any]
    params: dict[str, Any]


def train(
    model: Classifier, x: np.ndarray, labels: np.ndarray, *, seed: int, n_steps: int, batch: int, learning_rate: float
) -> Trained:
    """Trains a classifier on x [rows, d_in] and labels [rows]; see `minimise`."""
    key_init, key_train = jax.random.split(jax.random.key(seed))
    start = model.init(key_init)
    rows = (jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32))
    params, _ = minimise(
        start, rows, key_train, loss=model.loss, n_steps=n_steps, batch=batch, learning_rate=learning_rate
    )
    return Trained(model, start, params)


@functools.partial(jax.jit, static_argnames=("loss", "n_steps", "batch", "learning_rate"))
def minimise(
    params: Any,
    data: Any,
    key: jax.Array,
    *,
    loss: Callable[[Any, Any], jax.Array],
    n_steps: int,
    batch: int,
    learning_rate: float,
) -> tuple[Any, Float[Array, "n_steps"]]:
    """Minimises the mean loss of random batches by Adam under a cosine schedule; the whole run is one program.

    Args:
      params: Where to start; any pytree.
      data: Arrays with one row per example.
      key: Draws the batches, with replacement.
      loss: (params, rows of data) -> scalar; hashable, so that equal runs share one program.
      n_steps: Updates.
      batch: Rows per update.
      learning_rate: Of the first update; it falls to 0 along half a cosine.

    Returns:
      The trained parameters and the loss of every batch.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, n_steps))
    rows = jax.tree.leaves(data)[0].shape[0]

    def step(state, step_key):
        params, moments = state
        chosen = jax.random.randint(step_key, (batch,), 0, rows)
        value, gradient = jax.value_and_grad(loss)(params, jax.tree.map(lambda a: a[chosen], data))
        updates, moments = optimiser.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    (params, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, n_steps))
    return params, losses
