"""Loss and gradients of one TopK batch: the sparse form that saejax trains with against the plain dense form.

Both run in one process, turn by turn, on the same parameters and batch, so that whatever else the machine
does hits both. Printed are median times and the median of the ratios of neighbouring turns with quartiles.
The sparse form carries AuxK with nothing dead, as in most of a training run; the dense form has none.

    python benchmarks/step.py --d-in 768 --d-sae 16384 --batch 4096 --repeats 7
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import saejax
from saejax.sae import base, topk

LossAndGrads = Callable[[base.SAEParams, jax.Array], tuple[jax.Array, base.SAEParams]]


def sparse_form(sparsifier: topk.TopK) -> LossAndGrads:
    """What training differentiates."""
    step = jnp.zeros((), jnp.int32)

    def both(params: base.SAEParams, x: Float[Array, "b d_in"]) -> tuple[jax.Array, base.SAEParams]:
        dead = params.W_dec[:, 0] > 2  # none: the rows have norm 1; but the compiler cannot know
        (loss, _), grads = sparsifier.value_and_grad(params, x, dead=dead, step=step)
        return loss, grads

    return jax.jit(both)


def dense_form(sparsifier: topk.TopK) -> LossAndGrads:
    """The few lines that anyone would write first: dense latents, dense products, automatic gradients."""

    def loss(params: base.SAEParams, x: Float[Array, "b d_in"]) -> Float[Array, ""]:
        pre_acts = (x - params.b_dec[None, :]) @ params.W_enc + params.b_enc[None, :]
        values, indices = lax.top_k(pre_acts, sparsifier.k)
        rows = jnp.arange(x.shape[0])[:, None]
        latents = jnp.zeros_like(pre_acts).at[rows, indices].set(jax.nn.relu(values))
        recon = latents @ params.W_dec + params.b_dec[None, :]
        return jnp.mean(jnp.sum((x - recon) ** 2, axis=1))

    return jax.jit(jax.value_and_grad(loss))


def seconds(form: LossAndGrads, params: base.SAEParams, x: jax.Array) -> float:
    """Wall time of one finished call."""
    start = time.perf_counter()
    jax.block_until_ready(form(params, x))
    return time.perf_counter() - start


def check_equal(sparse: LossAndGrads, dense: LossAndGrads, params: base.SAEParams, x: jax.Array) -> float:
    """Both forms must compute the same thing, or their times mean nothing; returns the largest relative difference."""
    ours, theirs = sparse(params, x), dense(params, x)
    errors = []
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        errors.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    assert max(errors) < 1e-4, f"the two forms differ by {max(errors):.1e}"
    return max(errors)


def memory(form: LossAndGrads, params: base.SAEParams, x: jax.Array) -> float:
    """MiB of the gradients and of all temporary arrays, as the compiler planned them."""
    analysis = jax.jit(form).lower(params, x).compile().memory_analysis()
    assert analysis is not None
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20


def cpu_name() -> str:
    """Name of the processor where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    sparsifier = topk.TopK(d_in=args.d_in, d_sae=args.d_sae, k=args.k)
    key_params, key_x = jax.random.split(jax.random.key(0))
    params = sparsifier.init(key_params)
    x = jax.random.normal(key_x, (args.batch, args.d_in)) / args.d_in**0.5
    sparse, dense = sparse_form(sparsifier), dense_form(sparsifier)
    error = check_equal(sparse, dense, params, x)

    pairs = [(seconds(sparse, params, x), seconds(dense, params, x)) for _ in range(args.repeats)]
    ratios = [dense_s / sparse_s for sparse_s, dense_s in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    device = jax.devices()[0]
    where = f"{os.cpu_count()} x {cpu_name()}" if device.platform == "cpu" else device.device_kind
    print(f"saejax {saejax.__version__}, jax {jax.__version__}, Python {platform.python_version()}, {where}")
    print(f"d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}, batch {args.batch}, float32, {args.repeats} turns")
    print(f"sparse {1e3 * statistics.median(s for s, _ in pairs):8.1f} ms")
    print(f"dense  {1e3 * statistics.median(d for _, d in pairs):8.1f} ms")
    print(f"largest relative difference of the loss and the gradients: {error:.1e}")
    needs = [memory(form, params, x) for form in (sparse, dense)]
    print(f"gradients and temporaries: sparse {needs[0]:.0f} MiB, dense {needs[1]:.0f} MiB")
    print(f"dense / sparse: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
