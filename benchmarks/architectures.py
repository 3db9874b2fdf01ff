"""Every architecture on data whose features are known: recovery, dead latents, shrinkage, absorption, speed.

Two benchmarks (`activations.synthetic`): SB-iid, 256 independent features in 64 dimensions, 4 active in the mean row;
SB-hier, the same directions as 32 parents with 7 children each, 3.27 active. A cell is one training: a benchmark, the
overrides that make the architecture and a seed. Finished cells are lines of OUT/cells.jsonl and are not run again;
`--try` adds cells with other settings, which is how coefficients were chosen, on a seed that the table does not use.

    python benchmarks/architectures.py                              # what is missing: some 70 trainings of 3M rows
    python benchmarks/architectures.py --try "sae=l1 sae.l1_coef=0.7" --benchmarks iid --seeds 100
    python benchmarks/architectures.py --speed                      # seconds per million rows
    python benchmarks/architectures.py --table docs/architectures.md    # fills the page's tables
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import saejax
from saejax import config
from saejax.activations.synthetic import Synthetic
from saejax.evals import evaluate, reconstruction, shrinkage, sparsity
from saejax.lab.experiments import fit
from saejax.lab.experiments.known_codes import Dictionary, scores
from saejax.lab.metrics import absorption
from saejax.lab.metrics.over import over
from saejax.sae.model import SAE

HELDOUT_ROWS = 20_000
"""Rows of every measurement: a latent that fires on none of them is dead."""
RECIPE = (
    "normalize.mode=none optim.lr=0.002 optim.warmup_share=0 optim.decay_share=0.3 "
    "train.n_tokens=3072000 train.batch=512 train.dead_after_tokens=25600"
)
"""What all cells share unless their own overrides, which come later, say otherwise."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A source and what the architectures are told about it."""

    source: str
    """Overrides that choose it."""
    values: dict[str, Any]
    """What fills the braces of `ARCHITECTURES`: k and the coefficients chosen on seed 100."""


BENCHMARKS = {
    "iid": Benchmark("source=synthetic", {"k": 4, "l1": 0.4, "gated": 0.525, "prefixes": "[]"}),
    "hier": Benchmark("source=hierarchical", {"k": 3, "l1": 0.4, "gated": 0.525, "prefixes": "[32,256]"}),
}

ARCHITECTURES = {
    "TopK": "sae=topk sae.k={k} sae.aux_alpha=1",
    "TopK, no AuxK": "sae=topk sae.k={k} sae.aux_alpha=0",
    "BatchTopK": "sae=batch_topk sae.k={k} sae.aux_alpha=1",
    "BatchTopK, no AuxK": "sae=batch_topk sae.k={k} sae.aux_alpha=0",
    "L1": "sae=l1 sae.l1_coef={l1} sae.decoder_init_norm=1",
    "L1, plain": "sae=l1_plain sae.l1_coef={l1}",
    "JumpReLU": "sae=jumprelu sae.penalty=quadratic sae.target_l0={k} sae.l0_coef=1 sae.bandwidth=0.1 "
    "sae.threshold_init=0.1",
    "Gated": "sae=gated sae.l1_coef={gated} sae.l1_warmup_steps=2000",
    "Matryoshka": "sae=matryoshka sae.k={k} sae.prefixes={prefixes}",
    "Matryoshka, TopK": "sae=matryoshka sae.selection=topk sae.k={k} sae.prefixes={prefixes}",
    "P-anneal": "sae=p_anneal sae.l1_coef=0.2 sae.anneal_start_step=1000 sae.anneal_steps=4000",
    "AbsTopK": "sae=abs_topk sae.k={k} sae.aux_alpha=1 sae.k_aux=4",
    "Matching pursuit": "sae=matching_pursuit sae.k={k} sae.aux_alpha=1",
    "TopK, tied encoder": "sae=topk sae.k={k} sae.aux_alpha=1 sae.encoder=tied",
    "TopK, MLP encoder": "sae=topk sae.k={k} sae.aux_alpha=1 sae.encoder=mlp",
    "TopK, LISTA encoder": "sae=topk sae.k={k} sae.aux_alpha=1 sae.encoder=lista",
}
"""Name -> overrides of `saejax train`, complete but for the values of a benchmark."""

COLUMNS = {
    "dictionary MCC": ("mcc", 3),
    "cos > 0.9": ("recovered_features", 3),
    "dead": ("dead_share", 3),
    "L0": ("l0", 2),
    "fvu": ("fvu", 3),
    "reconstruction bias": ("relative_reconstruction_bias", 3),
    "L2 ratio": ("l2_ratio", 3),
    "support F1": ("f1", 3),
    "absorption": ("absorption", 3),
    "missed alone": ("missed_alone", 3),
}
"""Heading -> key of a cell and decimals."""


def composed(benchmark: str, line: str) -> config.Config:
    """The typed config of a cell, as `saejax train` would compose it."""
    return config.load("train", config.Config, [BENCHMARKS[benchmark].source, *RECIPE.split(), *line.split()])


@functools.lru_cache(maxsize=1)
def drawn(source: Synthetic, seed: int, n_rows: int) -> np.ndarray:
    """Training rows, [n_rows, d_in] float32, each used once: all architectures of a benchmark and a seed share them."""
    stream = source.open(n_lanes=1, block_rows=n_rows, lanes=range(1), seed=seed, prefetch=0)
    return next(stream)[0]


def trained(cfg: config.Config, rows: fit.Rows, seed: int, n_tokens: int) -> SAE:
    """One SAE by the config's recipe."""
    return fit.train(
        cfg.sae,
        rows,
        n_tokens=n_tokens,
        batch=cfg.train.batch,
        lr=cfg.optim.lr,
        warmup_share=cfg.optim.warmup_share,
        decay_share=cfg.optim.decay_share,
        clip_norm=cfg.optim.clip_norm,
        seed=seed,
        dead_after_tokens=cfg.train.dead_after_tokens or cfg.train.n_tokens // 32,
        norm=cfg.normalize.mode,
        b_dec_init=cfg.train.b_dec_init,
        resample_every_steps=cfg.train.resample_every_steps,
    )


def measured(sae: SAE, source: Synthetic) -> dict[str, float]:
    """Held-out figures: of the reconstruction, of the directions, of the codes."""
    metrics = (reconstruction.Reconstruction(), sparsity.Firing(windows=()), shrinkage.Norms())
    result = evaluate.evaluate(sae, source, max_rows=HELDOUT_ROWS, metrics=metrics)
    rows, codes = next(source.heldout_with_codes(HELDOUT_ROWS, HELDOUT_ROWS))
    found = np.abs(np.asarray(sae.encode(jnp.asarray(rows))))  # signed latents are on where they are not zero
    match = Dictionary.of_sae(sae, source.features()).match
    keys = {key for key, _ in COLUMNS.values()} | {"mcc_chance"}
    own = scores(codes, found, match) | families(source, codes, found, match)
    return {key: value for key, value in {**own, **result}.items() if key in keys}


def families(source: Synthetic, codes: np.ndarray, found: np.ndarray, match: np.ndarray) -> dict[str, Any]:
    """Absorption of parents into their children, parents matched by direction; nothing without parents."""
    parents = source.parents()
    if not (parents >= 0).any():
        return {}
    roots = np.flatnonzero(parents < 0)
    child = np.stack([(codes[:, parents == root] > 0).any(axis=1) for root in roots], axis=1)
    latent = np.where(match[roots][None, :] >= 0, found[:, match[roots]], 0.0)
    batch = absorption.FamilyBatch(
        parent=jnp.asarray(codes[:, roots] > 0), child=jnp.asarray(child), latent=jnp.asarray(latent, jnp.float32)
    )
    return over(absorption.ParentAbsorption(), batch)


def speed(line: str, short: int = 128_000, long: int = 640_000) -> dict[str, float]:
    """Seconds per million further rows of the benchmark SB-iid, by the clock and of all cores together.

    The difference of two trainings, so that neither compiling nor starting counts; nor does making the rows.
    """
    cfg = composed("iid", line)
    rows = drawn(Synthetic(), 0, long)
    taken = {}
    for n_tokens in (short, long):
        for _ in range(2):  # the first one compiles
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(trained(cfg, rows, 0, n_tokens).params.W_dec)
            taken[n_tokens] = time.perf_counter() - start[0], time.process_time() - start[1]
    wall, cpu = (1e6 * (b - a) / (long - short) for a, b in zip(taken[short], taken[long], strict=True))
    return {"seconds_per_million_rows": wall, "cpu_seconds_per_million_rows": cpu}


def lines_of(benchmark: str) -> dict[str, str]:
    """Architecture -> its overrides on one benchmark."""
    return {name: line.format(**BENCHMARKS[benchmark].values) for name, line in ARCHITECTURES.items()}


def finished(path: pathlib.Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The cells of a folder that were trained by today's recipe."""
    cells = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(cell["benchmark"], cell["overrides"], cell["seed"]): cell for cell in cells if cell["recipe"] == RECIPE}


def run(path: pathlib.Path, wanted: list[tuple[str, str, int]]) -> None:
    """Trains and measures what is not there yet, one line at a time."""
    for benchmark, line, seed in wanted:
        if (benchmark, line, seed) in finished(path):
            continue
        start = time.perf_counter()
        if benchmark == "speed":
            values: dict[str, Any] = speed(line)
        else:
            cfg = composed(benchmark, line)
            assert isinstance(cfg.source, Synthetic)
            rows = drawn(cfg.source, seed, cfg.train.n_tokens)
            values = measured(trained(cfg, rows, seed, cfg.train.n_tokens), cfg.source)
        cell = {"benchmark": benchmark, "overrides": line, "seed": seed, **values, "recipe": RECIPE}
        cell |= {"seconds": round(time.perf_counter() - start, 1), "saejax": saejax.__version__, "jax": jax.__version__}
        with path.open("a") as out:
            out.write(json.dumps(cell) + "\n")
        shown = {key: round(value, 3) for key, value in values.items()}
        print(benchmark, line, seed, shown, f"{cell['seconds']} s", flush=True)


def table(cells: dict[tuple[str, str, int], dict[str, Any]], benchmark: str, seeds: list[int]) -> str:
    """One benchmark as Markdown: a row for every architecture, the mean of its seeds and half their range."""
    of_families = ("absorption", "missed_alone")
    shown = {head: entry for head, entry in COLUMNS.items() if benchmark == "hier" or entry[0] not in of_families}
    heads = ["architecture", *shown, "CPU s per 1M rows"]
    rows = [heads, ["---"] * len(heads)]
    for name, line in lines_of(benchmark).items():
        own = [cells[benchmark, line, seed] for seed in seeds if (benchmark, line, seed) in cells]
        if own:
            fast = cells.get(("speed", lines_of("iid")[name], 0), {}).get("cpu_seconds_per_million_rows")
            figures = [_entry([cell[key] for cell in own], digits) for key, digits in shown.values()]
            label = name if len(own) == len(seeds) else f"{name} (1 seed)"
            rows.append([label, *figures, "" if fast is None else f"{fast:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _entry(values: list[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    spread = f" ± {half:.{digits}f}" if round(half, digits) > 0 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def machine() -> str:
    """Where the figures were made."""
    return (
        f"{os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}, saejax {saejax.__version__}, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )


def fill(page: pathlib.Path, tables: dict[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end NAME -->`."""
    text = page.read_text()
    for name, body in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f"{page} has no place for the table {name}")
    page.write_text(text)


def main() -> None:
    """Reads arguments, runs what is missing, prints or fills tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/architectures"))
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES), help="names of the table's rows")
    parser.add_argument("--try", dest="tries", action="append", help="overrides to run instead of the table's")
    parser.add_argument("--speed", action="store_true", help="time instead of training to the end")
    parser.add_argument("--table", type=pathlib.Path, nargs="?", const="-", help="print, or fill a page; runs nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.jsonl"
    if args.table:
        tables = {name: table(finished(path), name, args.seeds) for name in args.benchmarks}
        fill(args.table, tables) if str(args.table) != "-" else print(*tables.values(), machine(), sep="\n\n")
        return
    if args.speed:
        wanted = [("speed", lines_of("iid")[name], 0) for name in args.only]
    else:
        wanted = [
            (benchmark, line, seed)
            for seed in args.seeds
            for benchmark in args.benchmarks
            for line in args.tries or [lines_of(benchmark)[name] for name in args.only]
        ]
    run(path, wanted)


if __name__ == "__main__":
    main()
