"""How fast activations are written to a store and read from it: gigabytes of rows per second, page cache warm.

Written through the harvest's own writer, with its checksums and its fsync; read in order (each shard copied once into
one array), and through the loader that feeds the training: shuffled blocks of several sizes in several lanes, a record
at a time, with its thread reading ahead and without. Nothing touches a device. The fastest and the median of several
passes are printed, turn by turn over all layouts, so that whatever else the machine does hits all of them; and the
rate per second that a core worked, which other programs disturb little.

    python benchmarks/store.py --d-in 768 --gigabytes 0.5 --turns 5 --json store.json
    python benchmarks/store.py --quick
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import saejax
from saejax.activations import store
from saejax.activations.store import files as store_format
from saejax.activations.store.source import Store

CONTEXT, SHARD_SEQUENCES = 256, 128
BLOCKS = ((64, 8), (256, 8), (1024, 8), (256, 1), (256, 64))
"""Rows of a block, lanes: a batch is their product."""


def write(path: Path, rows: np.ndarray, split: str) -> None:
    """A store of `rows`, each of them one token."""
    per_shard = CONTEXT * SHARD_SEQUENCES
    n_shards = len(rows) // per_shard
    facts = {
        "hook": "blocks.0.hook_resid_post", "model": {"name": "none"}, "dtype": rows.dtype.name, "d_in": rows.shape[1],
        "context_length": CONTEXT, "shard_sequences": SHARD_SEQUENCES, "n_shards": n_shards,
        "n_sequences": n_shards * SHARD_SEQUENCES, "n_tokens": n_shards * per_shard, "split": split,
        "sink": {"factor": None, "median_norm": None},
    }  # fmt: skip
    with store.Writer(path / split, facts) as writer:
        for number in writer.missing():
            with writer.shard(number) as shard:
                for place in range(number * per_shard, (number + 1) * per_shard, 8 * CONTEXT):
                    shard.append(**content(rows[place : place + 8 * CONTEXT], place))
        writer.finish()


def content(rows: np.ndarray, first: int) -> dict[str, Any]:
    """What the harvest gives the writer for eight whole sequences."""
    column, number = np.arange(len(rows)) % CONTEXT, (first + np.arange(len(rows))) // CONTEXT
    tokens = np.stack([column, np.ones_like(column)], axis=-1).astype(store_format.INT)
    return {
        "rows": rows,
        "index": np.stack([column, column, number, number], axis=-1).astype(store_format.INT),
        "tokens": tokens.reshape(-1, CONTEXT, 2),
        "segment_documents": [[int(n)] for n in number[::CONTEXT]],
        "masked": {"position_zero": 0, "sink": 0},
    }


def sequential(path: Path) -> Callable[[], int]:
    """Every shard copied once, in order; the bytes of the rows."""
    reader = store.Reader(path / "train")
    kept = np.empty((CONTEXT * SHARD_SEQUENCES, reader.d_in), reader.dtype)

    def go() -> int:
        for start in range(0, reader.n_rows, len(kept)):
            np.copyto(kept, reader.rows(start, start + len(kept)))
        return reader.n_rows * kept[0].nbytes

    return go


def loader(path: Path, block_rows: int, n_lanes: int, prefetch: int) -> Callable[[], int] | None:
    """One epoch of records through the stream that training reads, opened once; None where it holds no step."""
    source = Store(path=str(path))
    if source.reader("train").n_rows < block_rows * n_lanes:
        return None
    stream = source.open(n_lanes=n_lanes, block_rows=block_rows, lanes=range(n_lanes), seed=0, prefetch=prefetch)
    n_records = (stream.n_rows or 0) // (block_rows * n_lanes)

    def go() -> int:
        return sum(next(stream).nbytes for _ in range(n_records))

    return go


def measure(d_in: int, gigabytes: float, turns: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Every layout's rates in GB/s, one dict each."""
    per_shard = CONTEXT * SHARD_SEQUENCES
    n_rows = max(2, round(gigabytes * 1e9 / (2 * d_in * per_shard))) * per_shard
    bits = np.random.default_rng(0).integers(0, 2**15, (n_rows, d_in), np.uint16)
    rows = bits.view(store_format.numpy_dtype("bfloat16"))
    seconds = timed(lambda: write(folder, rows, "train"))[1]
    yield {"what": "write, with checksums", **{key: [rows.nbytes / s / 1e9] for key, s in seconds.items()}}
    write(folder, rows[:per_shard], "heldout")
    passes: dict[str, Callable[[], int]] = {"read in order": sequential(folder)}
    for block_rows, n_lanes in BLOCKS:
        for prefetch in (2, 0):
            go = loader(folder, block_rows, n_lanes, prefetch)
            ahead = "reading ahead" if prefetch else "in the caller's thread"
            if go is not None:
                passes[f"loader, {n_lanes} lanes x blocks of {block_rows}, {ahead}"] = go
    rates: dict[str, dict[str, list[float]]] = {name: {"gb_per_s": [], "gb_per_cpu_s": []} for name in passes}
    for turn in range(turns + 1):
        for name, go in passes.items():
            n_bytes, seconds = timed(go)
            for key, taken in seconds.items() if turn else ():  # the first turn warms the page cache and Grain
                rates[name][key].append(n_bytes / taken / 1e9)
    yield from ({"what": name, **found} for name, found in rates.items())


def timed(go: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns; its seconds on the clock and of all cores, by the name of the rate they make."""
    begun, spent = time.perf_counter(), time.process_time()
    result = go()
    return result, {"gb_per_s": time.perf_counter() - begun, "gb_per_cpu_s": time.process_time() - spent}


def machine() -> str:
    """Processor, cores in use and load, for the caption of a table."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start"


def table(found: dict[str, Any]) -> Iterator[str]:
    """The results as markdown."""
    yield f"{found['machine']}; saejax {found['saejax']}, NumPy {np.__version__}, Python {platform.python_version()}; "
    yield f"d_in {found['d_in']}, bfloat16, {found['gigabytes']} GB, page cache warm, {found['turns']} turns"
    yield "\n| GB of rows | per second, median | fastest | per second of a core, median |\n|---|---|---|---|"
    for line in found["lines"]:
        clock, cores = line["gb_per_s"], line["gb_per_cpu_s"]
        figures = f"{statistics.median(clock):.2f} | {max(clock):.2f} | {statistics.median(cores):.2f}"
        yield f"| {line['what']} | {figures} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the store")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is written and removed; default: temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of a GB, two turns")
    args = parser.parse_args()
    if args.quick:
        args.gigabytes, args.turns = 0.1, 2
    found: dict[str, Any] = {"machine": machine(), "saejax": saejax.__version__}
    found |= {"d_in": args.d_in, "gigabytes": args.gigabytes, "turns": args.turns}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found["lines"] = list(measure(args.d_in, args.gigabytes, args.turns, Path(folder)))
    print("\n".join(table(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
