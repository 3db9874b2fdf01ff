"""The Pallas kernels for NVIDIA GPUs against the XLA forms that run by default: the same results first, then times.

Checked is every operation of `kernels.choice` at every shape: the encoder on small whole numbers, whose products are
exact, so that values, indices and ties must be equal; the sparse passes to float32 rounding; accumulation also for
the same bits twice. Timed are both forms turn by turn in one process; printed are median times, the median of the
ratios of neighbouring turns with quartiles, and the memory that each form takes besides arguments and results.

    python benchmarks/gpu_kernels.py                                   # all shapes, about ten minutes
    python benchmarks/gpu_kernels.py --shape 4096 131072 64 8192 --operation encode --turns 15
    python benchmarks/gpu_kernels.py --check --shape 512 4096 32 2048

Without a GPU it ends with one line and status 2.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import saejax
from saejax.errors import UserError
from saejax.kernels import choice, matmul, pallas_decode, pallas_encode, sparse_decode, top_k
from saejax.kernels.choice import Operation

SHAPES = [(512, 4096, 32, 2048), (768, 16384, 32, 4096), (2048, 65536, 64, 4096), (4096, 131072, 64, 8192)]
"""(d_in, d_sae, k, batch)"""
RELATIVE_ERROR = 1e-5


class Forms(NamedTuple):
    """One operation: its two forms, and what both are called with."""

    pallas: Callable[..., Any]
    xla: Callable[..., Any]
    args: tuple[jax.Array, ...]


def forms(operation: Operation, shape: tuple[int, ...], *, whole: bool = False, hot: bool = False) -> Forms:
    """Draws a problem: of normal numbers or of small whole ones; `hot` puts one latent into every row."""
    d_in, d_sae, k, batch = shape
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*size: int) -> jax.Array:
        if whole:
            return jax.random.randint(next(keys), size, -2, 3).astype(jnp.float32)
        return jax.random.normal(next(keys), size)

    if operation is Operation.encode:
        pallas, xla = (functools.partial(form, k=k) for form in (pallas_encode.top_k_of_product, unfused))
        return Forms(pallas, xla, (draw(batch, d_in), draw(d_in, d_sae), draw(d_sae)))
    values, indices = draw(batch, k), jax.random.randint(next(keys), (batch, k), 0, d_sae)
    indices = indices.at[:, 0].set(0) if hot else indices
    if operation is Operation.decode:
        return Forms(pallas_decode.combine_rows, sparse_decode.combine_rows, (values, indices, draw(d_sae, d_in)))
    if operation is Operation.dot:
        return Forms(pallas_decode.dot_rows, sparse_decode.dot_rows, (draw(batch, d_in), indices, draw(d_sae, d_in)))
    pallas, xla = (functools.partial(f.accumulate_rows, n=d_sae) for f in (pallas_decode, sparse_decode))
    return Forms(pallas, xla, (values, indices, draw(batch, d_in)))


def unfused(x: jax.Array, W: jax.Array, bias: jax.Array, k: int) -> Any:
    """The whole product, then top-k."""
    return top_k.top_k(matmul.matmul(x, W, "bfloat16") + bias[None, :], k)


def check(operation: Operation, shape: tuple[int, ...]) -> None:
    """Raises AssertionError where the two forms differ."""
    pallas, xla, args = forms(operation, shape, whole=operation is Operation.encode)
    pallas, xla = jax.jit(pallas), jax.jit(xla)
    ours, theirs = pallas(*args), xla(*args)
    if operation is Operation.encode:
        for got, want in zip(ours, theirs, strict=True):
            assert bool(jnp.all(got == want)), f"{np.mean(np.asarray(got != want)):.1%} of the entries differ"
        return
    error = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    assert error < RELATIVE_ERROR, f"relative error {error:.1e}"
    assert bool(jnp.all(pallas(*args) == ours)), "two runs differ in bits"


def compare(operation: Operation, shape: tuple[int, ...], turns: int, hot: bool) -> str:
    """Times both forms turn by turn and returns the line of the table."""
    pallas, xla, args = forms(operation, shape, hot=hot)
    compiled = [jax.jit(form).lower(*args).compile() for form in (pallas, xla)]
    extra = [analysis.temp_size_in_bytes / 2**30 for form in compiled if (analysis := form.memory_analysis())]
    for form in compiled:
        jax.block_until_ready(form(*args))
    pairs = [[1e3 * seconds(form, args) for form in compiled] for _ in range(turns)]
    low, middle, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4, method="inclusive")
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    name = operation.name + (", one latent in every row" if hot else "")
    return (
        f"| {name} | {ours:.2f} ms, {extra[0]:.2f} GiB | {theirs:.2f} ms, {extra[1]:.2f} GiB "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
    )


def seconds(form: Callable[..., Any], args: tuple[jax.Array, ...]) -> float:
    """Wall time of one finished call."""
    start = time.perf_counter()
    jax.block_until_ready(form(*args))
    return time.perf_counter() - start


def main() -> None:
    """Check, compare and print; status 1 where a kernel is wrong or does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("D_IN", "D_SAE", "K", "BATCH"))
    parser.add_argument("--operation", choices=list(Operation.__members__), nargs="+", default=[*Operation.__members__])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="correctness only")
    args = parser.parse_args()
    operations = [Operation[name] for name in args.operation]
    try:
        for operation in operations:
            choice.check_device(operation, "pallas")
    except UserError as error:
        print(f"nothing to measure: {error}", file=sys.stderr)
        sys.exit(2)

    print(f"saejax {saejax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    wrong = 0
    for shape in map(tuple, args.shape or SHAPES):
        print("\nd_in {}, d_sae {}, k {}, batch {}".format(*shape))
        print("| operation | pallas | XLA | XLA / pallas (quartiles) |\n|---|---|---|---|")
        for operation in operations:
            try:
                check(operation, shape)
                lines = [] if args.check else [compare(operation, shape, args.turns, hot=False)]
                if operation is Operation.accumulate and not args.check:
                    lines.append(compare(operation, shape, args.turns, hot=True))
            except Exception as error:  # one kernel that fails must not hide what the others do
                wrong += 1
                lines = [f"| {operation.name} | FAILED: {type(error).__name__}: {str(error).splitlines()[:1]} | | |"]
            print("\n".join(lines or [f"| {operation.name} | equal | | |"]), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
