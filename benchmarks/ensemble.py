"""What a member of an ensemble costs, against the step of a run of its own.

Both compiled steps carry all that training carries: draw from the buffer, normaliser, loss with AuxK, gradients, Adam,
constraint, counters of dead latents, metrics. In every turn the ensemble takes one step and each separate run takes
one, so that whatever else the machine does hits both. Printed are medians, and the median of the ratios of turns with
quartiles: time of the ensemble over the sum of the separate steps. A separate run would also read its own data, which
is counted only with `--live`: there the language model runs beside the training, once for the ensemble and once for
every separate run.

    python benchmarks/ensemble.py --k 8 16 24 32 40 48 56 64 --repeats 9 --json ensemble.json
    python benchmarks/ensemble.py --live --repeats 5
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import saejax
from saejax.activations import normalize
from saejax.activations.language_model.live import Live
from saejax.parallel import sharding
from saejax.sae import topk
from saejax.training import ensemble, memory, optim, settings
from saejax.training.ensemble_config import Form
from saejax.training.learner import Learner

N_LANES = 8


class Compared:
    """An ensemble and its separate runs, at the same step with the same parameters.

    Args:
      args: of the command line.
      form: of the ensemble.
    """

    def __init__(self, args: argparse.Namespace, form: Form) -> None:
        mesh = sharding.make_mesh()
        self._config = settings.TrainConfig(batch=args.batch, n_tokens=args.batch * 100_000)
        normalizing = normalize.NormalizeConfig(mode=normalize.NormMode.unit)
        saes = [topk.TopK(d_in=args.d_in, d_sae=args.d_sae, k=k) for k in args.k]
        rates = optim.OptimConfig(lr=1e-4)
        learners = [Learner(sae, rates, self._config, normalizing) for sae in saes]
        rng = np.random.default_rng(0)
        lanes = NamedSharding(mesh, P(sharding.DATA))
        n_lanes = 1 if args.live else N_LANES  # in one lane the model runs for every record, in eight for every eighth
        block = args.batch // n_lanes
        opened = {"n_lanes": n_lanes, "block_rows": block, "lanes": range(n_lanes), "seed": 0}
        self._streams = [iter(args.live.open(**opened)) for _ in range(1 + len(args.k))] if args.live else []
        self._lanes = lanes
        self._fresh = jax.device_put(rng.normal(size=(n_lanes, block, args.d_in)).astype(np.float32), lanes)
        filled = jax.device_put(rng.normal(size=(n_lanes, args.buffer, block, args.d_in)).astype(np.float32), lanes)
        born = learners[0].create(filled, mesh, seeds=range(len(saes)), data_seed=0)
        single = learners[0].abstract(filled, mesh)
        copied = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.copy(), tree))
        own = [dataclasses.replace(one, buffer=born[0].buffer, normalizer=born[0].normalizer) for one in born]
        self.states = [copied(one) for one in own]
        layout = ensemble.Layout(single, len(saes), form, mesh)
        self.joined = copied(layout.join(born))
        started = time.perf_counter()
        made = ensemble.make(learners, form, mesh)
        self.ensemble_step = memory.compile_step(made, layout.abstract, lanes, mesh, n_members=len(saes))
        self.compile_seconds = time.perf_counter() - started
        self.steps = [memory.compile_step(learner.step, single, lanes, mesh) for learner in learners]

    def _rows(self, stream: int) -> jax.Array:
        """The next rows: of the language model, or always the same."""
        if not self._streams:
            return self._fresh
        return jax.device_put(next(self._streams[stream]).astype(np.float32), self._lanes)

    def together(self) -> None:
        """One step of all members, finished."""
        self.joined, metrics = self.ensemble_step(self.joined, self._rows(0))
        jax.block_until_ready((self.joined, metrics))

    def alone(self, i: int) -> None:
        """One step of one separate run, finished."""
        self.states[i], metrics = self.steps[i](self.states[i], self._rows(1 + i))
        jax.block_until_ready((self.states[i], metrics))

    def difference(self) -> float:
        """Largest difference of decoders that took the same steps, over the largest entry."""
        worst = 0.0
        for i, one in enumerate(self.states):
            theirs = self.joined.members
            found = theirs[i].params.W_dec if isinstance(theirs, tuple) else theirs.params.W_dec[i]
            worst = max(worst, float(abs(found - one.params.W_dec).max() / abs(one.params.W_dec).max()))
        return worst

    def temporary_bytes(self) -> tuple[int, int]:
        """Bytes that the ensemble's step and the largest separate step take beside their states."""
        sizes = [compiled.memory_analysis().temp_size_in_bytes for compiled in (self.ensemble_step, *self.steps)]
        return sizes[0], max(sizes[1:])


def seconds(call: Callable[..., None], *args: Any) -> np.ndarray:
    """Wall time of a call, and the time that all cores worked for it."""
    started = np.array([time.perf_counter(), time.process_time()])
    call(*args)
    return np.array([time.perf_counter(), time.process_time()]) - started


def measured(compared: Compared, args: argparse.Namespace) -> dict[str, Any]:
    """Times of interleaved turns, and what they come to."""
    n = len(args.k)
    turns = []
    for _ in range(1 + args.repeats):  # the first warms caches up
        turns.append((seconds(compared.together), [seconds(compared.alone, i) for i in range(n)]))
    turns = turns[1:]
    ratios = np.array([together / sum(alone) for together, alone in turns])
    (low, middle, high), of_cores = np.quantile(ratios[:, 0], [0.25, 0.5, 0.75]), np.median(ratios[:, 1])
    temporary = compared.temporary_bytes()
    return {
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratio_of_core_seconds": of_cores,
        "ensemble_seconds": statistics.median(together[0] for together, _ in turns),
        "separate_seconds": {k: statistics.median(alone[i][0] for _, alone in turns) for i, k in enumerate(args.k)},
        "difference": compared.difference(),
        "compile_seconds": compared.compile_seconds,
        "temporary_bytes": {"ensemble": temporary[0], "separate": temporary[1]},
    }


def main() -> None:
    """Compare, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 24, 32, 40, 48, 56, 64])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--buffer", type=int, default=8, help="batches in the shuffle buffer")
    parser.add_argument("--form", choices=["loop", "vmap"], nargs="+", default=["loop"])
    parser.add_argument("--live", action="store_true", help="rows of the default language model, of its width")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.live = Live(n_tokens=2**20, heldout_tokens=4096) if args.live else None
    if args.live:
        args.d_in = args.live.d_in

    device = jax.devices()[0]
    where = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    sizes = {name: getattr(args, name) for name in ("d_in", "d_sae", "k", "batch", "buffer", "repeats")}
    machine = {"saejax": saejax.__version__, "jax": jax.__version__, "platform": platform.platform(), "device": where}
    print("  ".join(f"{name} {value}" for name, value in (machine | sizes).items()))
    results = {form: measured(Compared(args, Form[form]), args) for form in args.form}
    print("\n| form | ensemble | sum of separate steps | ratio (quartiles) | of core time | difference | compile |")
    print("|---|---|---|---|---|---|---|")
    for form, found in results.items():
        low, high = found["ratio_quartiles"]
        separate = sum(found["separate_seconds"].values())
        print(
            f"| {form} | {1e3 * found['ensemble_seconds']:.0f} ms | {1e3 * separate:.0f} ms | {found['ratio']:.3f} "
            f"({low:.3f} to {high:.3f}) | {found['ratio_of_core_seconds']:.3f} | "
            f"{found['difference']:.0e} | {found['compile_seconds']:.1f} s |"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "sizes": sizes, "forms": results}, indent=1))


if __name__ == "__main__":
    main()
