"""TopK and BatchTopK by saejax, SAELens and dictionary_learning on the demo's activations: whose SAE is better?

Every trainer gets the same rows in the same batches in the same order, and every SAE is read back from the files that
its trainer writes (`saejax.interop`) and measured by one evaluator on the same held-out documents. What is compared
is the trainers' own training steps: initialisation, loss, AuxK, clipping, constraint and optimiser.

What makes it fair:
* The rows are centred and scaled once, to E||x||^2 = 1 as dictionary_learning does; on top come SAELens' convention,
  E||x|| = sqrt(d_in), by its own scaler, and that of our recipe. So all profit from centring, which only ours does by
  itself.
* Two rows of the table per trainer. `own`: the learning rate and schedule that the trainer comes with (ours: the
  recipe of the demo; SAELens: 3e-4, constant; dictionary_learning: 2e-4 sqrt(2^14 / d_sae), warm-up, no decay).
  `best of grid`: the learning rate of GRID with the lowest held-out fvu on the first seed, then all seeds with it;
  warm-up and decay as in our recipe for all. Every trainer has the same number of tries.
* What the peers count in steps or tokens suits runs of some 500M tokens (dead after 10M tokens or 1000 steps, warm-up
  of 1000 steps, running thresholds over 100 or 1000 steps) and would never act here. Windows and warm-up are the same
  shares of the run as ours; thresholds are averaged over the last twentieth of the run at most. AuxK is on everywhere,
  with each trainer's own coefficient.
* Ours takes b_dec from the first 64 batches, dictionary_learning from its first; SAELens starts at zero.
* The learning rate is chosen on the held-out rows that are reported, for all trainers alike.

Peers are optional and belong into an environment of their own; what is not installed is left out:

    pip install torch sae-lens==6.54.12 && pip install --no-deps dictionary-learning==0.1.0 && pip install -e .
    python benchmarks/quality.py                        # whatever is missing; finished trainings are not run again
    python benchmarks/quality.py --only topk --seeds 0 1 --plan reference
    python benchmarks/quality.py --try "optim.decay_share=0.5"      # our TopK with other settings
    python benchmarks/quality.py --table                # runs nothing
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import platform
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from saejax import cli, config, interop
from saejax.activations import normalize
from saejax.evals import evaluate, reconstruction, sparsity
from saejax.parallel import sharding
from saejax.sae.model import SAE
from saejax.training import fold, optim, state, step

GRID = (1e-3, 2e-3, 4e-3)
"""Learning rates that every trainer is tried with."""
RECIPE_LR = 2e-3
"""Of our recipe: the training of the grid with it is our own one, and not done twice."""
PLANS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "scripts" / "demo.py"))["PLANS"]
"""Harvest and recipe of `make demo` and `make reference`."""
THREADS = 2
"""Of PyTorch."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trainers are given.

    Attributes:
      cfg: our recipe, whose sizes and shares of the run hold for everybody.
      rows: [n, d_in] float32, centred, E||x||^2 = 1.
      heldout: [m, d_in] of other documents, likewise.
      seed: of the parameters and of the order of the rows.
      lr: learning rate of the grid; None for the trainer's own settings.
    """

    cfg: config.Config
    rows: Float[np.ndarray, "n d_in"]
    heldout: Float[np.ndarray, "m d_in"]
    seed: int
    lr: float | None

    @property
    def n_steps(self) -> int:
        """Optimiser steps."""
        return self.cfg.train.n_steps

    @property
    def n_warmup(self) -> int:
        """Steps of warm-up."""
        return round(self.cfg.optim.warmup_share * self.n_steps)

    @property
    def n_decay(self) -> int:
        """Steps of the final decay."""
        return round(self.cfg.optim.decay_share * self.n_steps)

    @property
    def sizes(self) -> dict[str, int]:
        """d_in, d_sae and k."""
        return {"d_in": self.cfg.sae.d_in, "d_sae": self.cfg.sae.d_sae, "k": getattr(self.cfg.sae, "k")}  # noqa: B009

    def batches(self) -> Iterator[np.ndarray]:
        """The batches [batch, d_in] of the run, each epoch in an order of its own."""
        rng, order, size = np.random.default_rng(self.seed), np.empty(0, np.int64), self.cfg.train.batch
        for _ in range(self.n_steps):
            while len(order) < size:
                order = np.concatenate([order, rng.permutation(len(self.rows))])
            taken, order = order[:size], order[size:]
            yield self.rows[taken]


def saejax_trains(task: Task, folder: pathlib.Path) -> SAE:
    """Our training step on the given batches, as `saejax train` would call it."""
    cfg, n_steps = task.cfg, task.n_steps
    rates = cfg.optim if task.lr is None else dataclasses.replace(cfg.optim, lr=task.lr)
    tx = optim.make(rates, n_steps, cfg.sae.lr_scales(), d_sae=cfg.sae.d_sae)
    filling = cfg.buffer.n_batches(cfg.train.batch)
    first = np.stack([batch for batch, _ in zip(task.batches(), range(filling), strict=False)])
    settings = dataclasses.replace(cfg.train, n_lanes=1)
    filled, mesh = jnp.asarray(first)[None], sharding.make_mesh(1, 1)
    now = state.create(cfg.sae, tx, settings, cfg.normalize, filled, seed=task.seed, mesh=mesh)
    now = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), now)
    # A buffer of one batch gives every step the batch that the step before put there.
    now = dataclasses.replace(now, buffer=dataclasses.replace(now.buffer, rows=now.buffer.rows[:, :1]))
    one = step.make(
        cfg.sae,
        tx,
        dead_window_tokens=settings.dead_window_tokens,
        learning_rate=optim.schedule(rates, n_steps, cfg.sae.d_sae),
        ema_decay=settings.ema_decay,
        resample_every_steps=settings.resample_every_steps,
    )
    advance = jax.jit(one, donate_argnums=0)
    following = task.batches()
    last = next(following)
    for _ in range(n_steps):
        last = next(following, last)
        now, _ = advance(now, last[None])
    _, params = fold.folded(cfg.sae, now.chosen, now.normalizer)
    return interop.load(interop.export(SAE(cfg.sae, params, {}), folder))


def saelens_trains(task: Task, folder: pathlib.Path) -> SAE:
    """SAELens' trainer, its loop, its scaling, its inference file."""
    import sae_lens.config  # pyright: ignore[reportMissingImports]
    import sae_lens.registry  # pyright: ignore[reportMissingImports]
    import sae_lens.training.sae_trainer  # pyright: ignore[reportMissingImports]
    import torch

    torch.manual_seed(task.seed)
    per_batch = task.cfg.sae.name == "batch_topk"
    kind, settings = sae_lens.registry.get_sae_training_class("batchtopk" if per_batch else "topk")
    own = {"topk_threshold_lr": max(0.01, 20 / task.n_steps)} if per_batch else {}
    sae = kind(settings(**task.sizes, normalize_activations="expected_average_only_in", **own))
    lr = 3e-4 if task.lr is None else task.lr
    shape = {} if task.lr is None else {"lr_warm_up_steps": task.n_warmup, "lr_decay_steps": task.n_decay}
    batch = task.cfg.train.batch
    trainer = sae_lens.training.sae_trainer.SAETrainer(
        sae_lens.config.SAETrainerConfig(
            total_training_samples=task.n_steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr / 10,
            dead_feature_window=task.cfg.train.dead_window_tokens // batch,
            **shape,
        ),
        sae,
        map(torch.from_numpy, task.batches()),
    )
    norms = np.linalg.norm(task.rows, axis=1)
    trainer.activation_scaler.scaling_factor = math.sqrt(task.rows.shape[1]) / float(norms.mean())
    trainer.fit()
    sae.save_inference_model(str(folder))
    return interop.load(folder)


def dictionary_learning_trains(task: Task, folder: pathlib.Path) -> SAE:
    """dictionary_learning's trainer, one `update` after the other, and its files."""
    import torch
    from dictionary_learning.trainers import batch_top_k, top_k  # pyright: ignore[reportMissingImports]

    per_batch = task.cfg.sae.name == "batch_topk"
    trainer = (batch_top_k.BatchTopKTrainer if per_batch else top_k.TopKTrainer)(
        steps=task.n_steps,
        activation_dim=task.sizes["d_in"],
        dict_size=task.sizes["d_sae"],
        k=task.sizes["k"],
        layer=0,
        lm_name="smollm2",
        lr=task.lr,
        warmup_steps=task.n_warmup,
        decay_start=None if task.lr is None else task.n_steps - task.n_decay,
        threshold_start_step=task.n_steps // 2,
        threshold_beta=min(0.999, 1 - 20 / task.n_steps),
        seed=task.seed,
        device="cpu",
    )
    trainer.dead_feature_threshold = task.cfg.train.dead_window_tokens
    for number, batch in enumerate(task.batches()):
        trainer.update(number, torch.from_numpy(batch))
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}))
    return interop.load(folder)


TRAINERS: dict[str, tuple[str, str, Callable[[Task, pathlib.Path], SAE]]] = {
    "saejax": ("saejax", "saejax", saejax_trains),
    "SAELens": ("sae_lens", "sae-lens", saelens_trains),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning", dictionary_learning_trains),
}
"""Name -> module that must be there, its distribution, and how it trains."""


def versions() -> dict[str, str]:
    """Of the trainers that are installed."""
    found = {name: dist for name, (module, dist, _) in TRAINERS.items() if importlib.util.find_spec(module)}
    return {name: importlib.metadata.version(dist) for name, dist in found.items()}


@functools.lru_cache(maxsize=1)
def data(plan: str, store: pathlib.Path, line: str) -> tuple[config.Config, np.ndarray, np.ndarray]:
    """Recipe, training rows and held-out rows, normalised; harvested first where they are not there."""
    if not (store / "heldout").is_dir() and cli.main(["harvest", f"path={store}", *PLANS[plan].harvest]):
        raise SystemExit(1)
    cfg = config.load("train", config.Config, [*PLANS[plan].train, f"source.path={store}", *line.split()])
    reader: Any = getattr(cfg.source, "reader")("train")  # noqa: B009
    raw = np.asarray(reader.rows(0, reader.n_rows), np.float32)
    normalizer = normalize.estimate(
        jnp.asarray(raw), normalize.NormMode.unit, center=cfg.normalize.center, preferred=normalize.NormMode.unit
    )
    heldout = np.concatenate([np.asarray(block, np.float32) for block in cfg.source.heldout(4096)])
    rows, heldout = (np.asarray(normalize.apply(normalizer, jnp.asarray(part))) for part in (raw, heldout))
    return cfg, rows, heldout


def measured(sae: SAE, task: Task) -> dict[str, float]:
    """Held-out figures."""
    window = task.cfg.train.dead_window_tokens
    metrics = (reconstruction.Reconstruction(), sparsity.Firing(windows=(window,)))
    found = evaluate.evaluate(sae, task.heldout, metrics=metrics)
    (windowed,) = (value for key, value in found.items() if key.startswith("dead_fraction_"))
    return {**{key: found[key] for key in ("fvu", "l0", "dead_share")}, "dead_in_windows": windowed, "window": window}


Cell = tuple[str, str, str, float | None, int]
"""Plan, overrides, trainer, learning rate of the grid or None, seed."""


def cell_of(plan: str, line: str, name: str, lr: float | None, seed: int) -> Cell:
    """The cell of a training; our own one where the grid would do it again."""
    return plan, line, name, None if name == "saejax" and lr == RECIPE_LR else lr, seed


def finished(path: pathlib.Path) -> dict[Cell, dict[str, Any]]:
    """The trainings of a folder."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = map(json.loads, lines)
    return {(c["plan"], c["overrides"], c["trainer"], c["lr"], c["seed"]): c for c in cells}


def run(path: pathlib.Path, store: pathlib.Path, cell: Cell) -> None:
    """One training, unless it is there; a line of `path`."""
    plan, line, name, lr, seed = cell
    if cell in finished(path) or name not in versions():
        return
    cfg, rows, heldout = data(plan, store, line)
    assert line or cfg.optim.lr == RECIPE_LR, f"the recipe has optim.lr={cfg.optim.lr}"
    task = Task(cfg, rows, heldout, seed, lr)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sae = TRAINERS[name][2](task, pathlib.Path(folder))
    taken = time.perf_counter() - start
    values = measured(sae, task)
    about = {"plan": plan, "overrides": line, "trainer": name, "lr": lr, "seed": seed, "version": versions()[name]}
    about |= {"tokens": cfg.train.n_steps * cfg.train.batch, "batch": cfg.train.batch, "seconds": round(taken, 1)}
    with path.open("a") as out:
        out.write(json.dumps({**about, **task.sizes, **values}) + "\n")
    print(
        plan, line, name, lr or "own", seed, {k: round(v, 4) for k, v in values.items()}, f"{taken:.0f} s", flush=True
    )


def best(cells: dict[Cell, dict[str, Any]], plan: str, line: str, name: str, seed: int) -> float | None:
    """The learning rate of the grid with the lowest held-out fvu on one seed; None where some are missing."""
    tried = {lr: cells[cell] for lr in GRID if (cell := cell_of(plan, line, name, lr, seed)) in cells}
    return min(tried, key=lambda lr: tried[lr]["fvu"]) if len(tried) == len(GRID) else None


def table(cells: dict[Cell, dict[str, Any]], plan: str, lines: list[str], seeds: list[int]) -> str:
    """Markdown: two rows for every trainer, the mean of the seeds and half their range."""
    heads = [
        "architecture",
        "trainer",
        "learning rate",
        "held-out fvu",
        "silent on held-out",
        "silent in windows",
        "L0",
    ]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        for name in TRAINERS:
            lrs = [None, found] if (found := best(cells, plan, line, name, seeds[0])) else [None]
            for lr in lrs:
                cells_of = [cell_of(plan, line, name, lr, seed) for seed in seeds]
                own = [cells[cell] for cell in cells_of if cell in cells]
                if own:
                    shown = [("fvu", 4, 1), ("dead_share", 2, 100), ("dead_in_windows", 2, 100), ("l0", 1, 1)]
                    figures = [_entry([c[key] * by for c in own], digits, by) for key, digits, by in shown]
                    rate = "own" if lr is None else f"{lr:g} (best of {len(GRID)})"
                    rows.append([line or "the recipe", f"{name} {own[0]['version']}", rate, *figures])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _entry(values: list[float], digits: int, by: int) -> str:
    spread = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}" + (" %" if by == 100 else "")


LINES = {"topk": "", "batch_topk": "sae=batch_topk"}
"""Architecture -> overrides of the plan's recipe."""


def main() -> None:
    """Reads arguments, trains what is missing, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="demo", choices=list(PLANS))
    parser.add_argument("--store", type=pathlib.Path, help="harvested where missing; default: OUT/store_PLAN")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/quality"))
    parser.add_argument("--only", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--set", default="", help="overrides for all trainers, as train.n_tokens=32768")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--no-grid", action="store_true", help="own settings only")
    parser.add_argument("--try", dest="tries", action="append", help="overrides to run with saejax alone")
    parser.add_argument("--table", action="store_true", help="runs nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path, store = args.out / "cells.jsonl", args.store or args.out / f"store_{args.plan}"
    lines = [" ".join([args.set, LINES[name]]).strip() for name in args.only]
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(THREADS)
    for line in [] if args.table else args.tries or []:
        for seed in args.seeds:
            run(path, store, (args.plan, f"{args.set} {line}".strip(), "saejax", None, seed))
    for line in [] if args.table or args.tries else lines:
        for name in args.trainers:
            for seed in args.seeds:
                run(path, store, (args.plan, line, name, None, seed))
            for lr in () if args.no_grid else GRID:
                run(path, store, cell_of(args.plan, line, name, lr, args.seeds[0]))
            chosen = best(finished(path), args.plan, line, name, args.seeds[0])
            for seed in args.seeds if chosen else ():
                run(path, store, cell_of(args.plan, line, name, chosen, seed))
    shown = table(finished(path), args.plan, args.tries or lines, args.seeds)
    here = f"{platform.machine()}, {', '.join(f'{name} {version}' for name, version in versions().items())}"
    (args.out / "table.md").write_text(shown + "\n")
    print(shown, here, sep="\n\n")


if __name__ == "__main__":
    main()
