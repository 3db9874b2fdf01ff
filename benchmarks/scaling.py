"""What a full training step costs against d_sae, d_in, k, batch and devices: one of them varied, the others held.

A step is what a run compiles: draw from the buffer, loss, AuxK with nothing dead, gradients, clipping, Adam, unit
decoder, liveness, metrics. Every point runs in a process of its own, which alone gives a peak of memory, and on a CPU
as many devices as are asked for; two steps warm it up. Printed are the median and fastest step, tokens and model FLOP
per second (`saejax.training.flops`), and the growth of the step over the point before: 1 is proportional to what is
varied. Devices of a CPU share its cores: their row shows what partitioning costs there, not what more hardware gives.

    python benchmarks/scaling.py --steps 10 --json scaling.json
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --only d_sae k --sae batch_topk
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from store import machine

CENTRE = {"d_sae": 4096, "d_in": 512, "k": 32, "batch": 2048, "devices": 1}
SWEEPS = {
    "d_sae": (2048, 4096, 8192, 16384, 32768),
    "d_in": (256, 512, 1024, 2048),
    "k": (8, 32, 128),
    "batch": (512, 1024, 2048, 4096),
    "devices": (1, 2),
}
QUICK_CENTRE = {"d_sae": 512, "d_in": 64, "k": 8, "batch": 256, "devices": 1}
QUICK_SWEEPS = {"d_sae": (512, 1024), "k": (8, 16), "devices": (1, 2)}


def point(sae: str, dtype: str, steps: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Times of `steps` steps at one point; called in its own process."""
    import jax

    if not _accelerators():
        jax.config.update("jax_num_cpu_devices", sizes["devices"])
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from saejax import config
    from saejax.parallel import sharding
    from saejax.runs import run
    from saejax.training import flops, memory

    overrides = [
        f"sae={sae}", f"sae.d_sae={sizes['d_sae']}", f"sae.matmul_dtype={dtype}", f"source.d_in={sizes['d_in']}",
        f"train.batch={sizes['batch']}", f"train.n_tokens={1000 * sizes['batch']}", f"buffer.rows={8 * sizes['batch']}",
        f"mesh.data={sizes['devices']}", "train.dead_after_tokens=1000000000",
    ]  # fmt: skip
    if sae not in ("l1", "jumprelu", "gated", "p_anneal"):
        overrides.append(f"sae.k={sizes['k']}")
    cfg = config.load("train", config.Config, overrides)
    mesh = sharding.make_mesh(sizes["devices"])
    lanes = NamedSharding(mesh, P(sharding.DATA))
    learner = run.learner(cfg)
    rows = np.random.default_rng(0).standard_normal((8, 8, cfg.train.block_rows, sizes["d_in"]), np.float32)
    filled = jax.device_put(rows, lanes)
    wanted = learner.abstract(filled, mesh)
    compiled = memory.compile_step(learner.step, wanted, lanes, mesh)
    now: Any = learner.create(filled, mesh, seeds=(0,), data_seed=0)[0]
    fresh, seconds = jax.device_put(rows[:, 0], lanes), []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        now, metrics = compiled(now, fresh)
        jax.block_until_ready((now, metrics))
        seconds.append(time.perf_counter() - begun)
    work = flops.work(cfg.sae, cfg.train.batch, sizes["devices"])
    device = jax.devices()[0].device_kind
    return {"seconds": seconds[2:], "flops": work.per_step, "peak_bytes": memory.peak_bytes(), "device": device}


def _accelerators() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev").glob("accel*"))


def measured(args: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    """`point` in a process of its own."""
    command = [sys.executable, __file__, "--sae", args.sae, "--dtype", args.dtype, "--steps", str(args.steps)]
    environment = os.environ | {"NPROC": os.environ.get("NPROC", "16")}
    done = subprocess.run(
        [*command, "--point", json.dumps(sizes)], env=environment, capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        return {"sizes": sizes, "failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return {"sizes": sizes} | json.loads(done.stdout.splitlines()[-1])


def table(name: str, points: list[dict[str, Any]]) -> Iterator[str]:
    """One sweep as markdown."""
    yield f"\n| {name} | step, ms | fastest | tokens/s | model GFLOP/s | peak memory, GiB | growth |"
    yield "|---|---|---|---|---|---|---|"
    before: dict[str, Any] | None = None
    for one in points:
        size = one["sizes"][name]
        if "failed" in one:
            yield f"| {size} | {one['failed']} | | | | | |"
            continue
        step = statistics.median(one["seconds"])
        rates = (
            f"{one['sizes']['batch'] / step:,.0f} | {one['flops'] / step / 1e9:.1f} | {one['peak_bytes'] / 2**30:.2f}"
        )
        growth = ""
        if before is not None:
            ratio = step / statistics.median(before["seconds"])
            growth = f"{math.log(ratio) / math.log(size / before['sizes'][name]):.2f}"
        yield f"| {size} | {1e3 * step:.1f} | {1e3 * min(one['seconds']):.1f} | {rates} | {growth} |"
        before = one


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sae", default="topk")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the products")
    parser.add_argument("--only", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes, three steps")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(args.sae, args.dtype, args.steps, args.point)))
        return
    args.steps = 3 if args.quick else args.steps
    centre, sweeps = (QUICK_CENTRE, QUICK_SWEEPS) if args.quick else (CENTRE, SWEEPS)
    found: dict[str, Any] = {"machine": machine(), "sae": args.sae, "dtype": args.dtype, "centre": centre, "sweeps": {}}
    held = ", ".join(f"{name} {size}" for name, size in centre.items())
    print(f"{found['machine']}; {args.sae}, {args.dtype} products, {args.steps} steps; held where not varied: {held}")
    for name in [name for name in sweeps if name in args.only]:
        found["sweeps"][name] = [measured(args, centre | {name: size}) for size in sweeps[name]]
        print("\n".join(table(name, found["sweeps"][name])), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
