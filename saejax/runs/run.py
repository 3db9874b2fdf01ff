"""Run: a `Config` to a finished run directory (mesh, data, state, loop, record), and back with `load(run_dir)`."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import config
from saejax.activations import normalize
from saejax.activations.source import RowIterator
from saejax.errors import UserError
from saejax.evals import evaluate
from saejax.fields import paths
from saejax.parallel import processes, sharding
from saejax.runs import agreement, directory
from saejax.sae import base, model, per_row
from saejax.storage import atomic, checkpoint, checkpoint_record, json_yaml, tracking
from saejax.storage.version import SOURCES, VERSION
from saejax.training import (
    diagnose,
    ensemble_config,
    flops,
    fold,
    loop,
    memory,
    nonfinite,
    state,
)
from saejax.training.learner import Learner

logger = logging.getLogger(__name__)

Put = Callable[[np.ndarray], jax.Array]
"""From a record of this process's lanes to the global array."""


def train(cfg: config.Config, run_dir: Path, *, resume: bool = False) -> loop.Outcome:
    """Train to the end or to a signal; everything is saved in the run directory.

    Args:
      cfg: see `config.Config`.
      run_dir: made where missing. Without `resume` it must hold no checkpoint.
      resume: go on from the newest checkpoint that can be read.

    Returns:
      How it ended.

    Raises:
      UserError: before any device work for impossible combinations; later for lack of memory, a full disk or a
        loss that is no longer finite.
    """
    if cfg.ensemble.points:
        raise UserError("an ensemble is trained by saejax.runs.ensembles.train, or from the command line")
    run_dir = paths.local(run_dir, "run_dir")
    agreement.same_work(cfg.source, resume=resume, devices=jax.device_count())
    config.check_data(cfg)
    mesh = sharding.make_mesh(*cfg.mesh.shape(jax.device_count(), n_lanes=cfg.train.n_lanes))
    sharding.check_divides(mesh, n_lanes=cfg.train.n_lanes, d_sae=cfg.sae.d_sae)
    with contextlib.ExitStack() as stack:
        owner = directory.take(cfg, run_dir, resume, stack)
        rows, put = open_stream(cfg, mesh)
        one = learner(cfg)
        checkpoints = checkpoint.Checkpoints(run_dir, cfg.checkpoint, owner)
        stack.callback(checkpoints.close)
        records = [next(rows)] if resume else first_filling(cfg, rows)
        first = records[0]
        wanted = one.abstract(filling(cfg, first), mesh)
        check_room(cfg, [run_dir], wanted)
        compiled = memory.compile_step(one.step, wanted, NamedSharding(mesh, P(sharding.DATA)), mesh)
        if resume:
            train_state, position = checkpoints.restore(wanted)
            rows.set_state(position)
        else:
            filled = fill(cfg, records, put)
            (train_state,) = one.create(filled, mesh, seeds=(cfg.seed,), data_seed=cfg.stream_seed)
        directory.begin(cfg, run_dir, owner, int(train_state.step))
        tracker = tracking.Tracker(
            run_dir,
            cfg.tracker,
            config.to_plain(cfg),
            start_step=int(train_state.step),
            enabled=jax.process_index() == 0,
        )
        stack.callback(tracker.close)
        outcome = loop.fit(
            train_state,
            compiled,
            rows,
            loop.Surroundings(
                put=put,
                evaluate=evaluation(cfg, mesh),
                checkpoints=checkpoints,
                tracker=tracker,
                inspect=inspector(cfg, run_dir, mesh, rows, first),
            ),
            config=cfg.train,
            save_every_steps=cfg.checkpoint.save_every_steps,
            work=flops.work(cfg.sae, cfg.train.batch, mesh.size, measure=cfg.train.measure_peak),
            profile=run_dir / "profile" if cfg.train.profile and jax.process_index() == 0 else None,
        )
        checkpoints.wait()
        if outcome.speed["steps"] or not (run_dir / "run.json").exists():
            write_record(cfg, run_dir, mesh, rows, outcome)
    return outcome


def learner(cfg: config.Config) -> Learner:
    """The learner of a run."""
    return Learner(cfg.sae, cfg.optim, cfg.train, cfg.normalize)


def load(run_dir: str | Path, step: int | None = None) -> model.SAE:
    """The SAE of a run, on one device, working in the data's own scale.

    Args:
      run_dir: as written by `train`.
      step: which checkpoint; None takes the newest.

    Returns:
      A `saejax.sae.model.SAE`; `provenance` says from which run, step and data it is.

    Raises:
      UserError: not a run directory, or no such checkpoint.
    """
    run_dir = paths.local(run_dir, "run")
    stamp, cfg = json_yaml.read_run(run_dir)[1], config.from_run(run_dir)
    if cfg.ensemble.points:
        raise UserError(
            f"{run_dir} is an ensemble: take one of {', '.join(map(str, ensemble_config.dirs(cfg, run_dir)))}"
        )
    owner = checkpoint_record.Owner(
        run_id=stamp.run_id,
        config=directory.definition(cfg),
        fixed=directory.fixed(cfg),
        older_up_to_step=stamp.older_up_to_step,
    )
    chosen = "average" if cfg.averaged else "params"
    found_step, arrays = checkpoint.load_arrays(run_dir, (chosen, "normalizer"), step, owner)
    found, said = arrays[chosen]["W_dec"].shape, (cfg.sae.d_sae, cfg.sae.d_out)
    if found != said:
        raise UserError(f"{run_dir}: W_dec is {list(found)}, config.yaml says {list(said)}")
    layered = cfg.normalize.mode is normalize.NormMode.layer_norm
    normalizer = normalize.Normalizer(**arrays["normalizer"], per_row=layered)
    sparsifier, params = fold.folded(cfg.sae, base.SAEParams(**arrays[chosen]), normalizer)
    provenance = {
        "run": str(run_dir),
        "step": found_step,
        "tokens": found_step * cfg.train.batch,
        "seed": cfg.seed,
        "source": directory.data_of(run_dir, found_step).get("fingerprint", {}),
    }
    return model.SAE(sparsifier, params, provenance)


def check_room(cfg: config.Config, run_dirs: Sequence[Path], wanted: Any) -> None:
    """Refuse a run whose checkpoints would find no room, before it is compiled; one that is finished needs none.

    Args:
      cfg: of the run, or of the first of an ensemble.
      run_dirs: of all that are trained together.
      wanted: abstract state of one.
    """
    with processes.alike():
        if processes.first() and directory.look(cfg, run_dirs[0]).step != cfg.train.n_steps:
            one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
            atomic.check_room(run_dirs[0], one * len(run_dirs))


def open_stream(cfg: config.Config, mesh: Mesh) -> tuple[RowIterator, Put]:
    """The rows of this process's lanes, and what takes a record to the devices.

    Raises:
      UserError: the source has no held-out rows, or too few others.
    """
    with processes.alike():
        nonfinite.check_heldout(cfg.source.heldout(cfg.train.batch, cfg.train.eval_rows), cfg.source.place())
    n_lanes, lane_sharding = cfg.train.n_lanes, NamedSharding(mesh, P(sharding.DATA))
    lanes = _own_lanes(lane_sharding, n_lanes)
    rows = cfg.source.open(n_lanes=n_lanes, block_rows=cfg.train.block_rows, lanes=lanes, seed=cfg.stream_seed)
    return rows, functools.partial(_to_devices, lane_sharding, n_lanes, lanes)


def filling(cfg: config.Config, first: np.ndarray) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the buffer, the dtype from a first record."""
    n_batches = cfg.buffer.n_batches(cfg.train.batch)
    return jax.ShapeDtypeStruct((cfg.train.n_lanes, n_batches, cfg.train.block_rows, cfg.source.d_in), first.dtype)


def first_filling(cfg: config.Config, rows: RowIterator) -> list[np.ndarray]:
    """The records of the first filling of the buffer, refused where nothing can be learned from them."""
    with processes.alike():
        records = [next(rows) for _ in range(cfg.buffer.n_batches(cfg.train.batch))]
        nonfinite.check_first(records, rows, cfg.normalize.rows, cfg.source.place())
    return records


def fill(cfg: config.Config, records: list[np.ndarray], put: Put) -> jax.Array:
    """First filling of the buffer, and a diagnosis of it; `records` are consumed."""
    filled = put(np.stack(records, axis=1))
    records.clear()
    diagnose.report(state.sample(filled, cfg.normalize.rows, cfg.train.batch), cfg.normalize)
    return filled


def inspector(
    cfg: config.Config, run_dir: Path, mesh: Mesh, rows: RowIterator, first: np.ndarray
) -> nonfinite.Inspector:
    """Inspector that finds and saves the rows of a step that is not finite."""
    lanes = _own_lanes(NamedSharding(mesh, P(sharding.DATA)), cfg.train.n_lanes)
    return nonfinite.Inspector(run_dir, rows, lanes, filling(cfg, first).shape)


def _own_lanes(lane_sharding: NamedSharding, n_lanes: int) -> range:
    """The lanes whose rows live on this process's devices."""
    indices: Any = lane_sharding.addressable_devices_indices_map((n_lanes,))
    slices = [index[0] for index in indices.values()]
    starts = [s.start or 0 for s in slices]
    stops = [n_lanes if s.stop is None else s.stop for s in slices]
    return range(min(starts), max(stops))


def _to_devices(lane_sharding: NamedSharding, n_lanes: int, lanes: range, record: np.ndarray) -> jax.Array:
    shape = (n_lanes, *record.shape[1:])
    if not processes.several():
        return jax.make_array_from_process_local_data(lane_sharding, record, shape)

    def part(index: Any) -> np.ndarray:  # a process whose members change may hold the first and the last lanes only
        start, stop, _ = index[0].indices(n_lanes)
        return record[start - lanes.start : stop - lanes.start]

    return jax.make_array_from_callback(shape, lane_sharding, part)


def evaluation(cfg: config.Config, mesh: Mesh, heldout: Callable[[], Iterable[np.ndarray]] | None = None) -> Any:
    """Held-out metrics of a `TrainState`, compiled once; on the rows of `heldout()`, None for those of the source."""
    heldout = heldout or functools.partial(cfg.source.heldout, cfg.train.batch, cfg.train.eval_rows)
    json_yaml = cfg.normalize.mode not in (normalize.NormMode.layer_norm, normalize.NormMode.whiten)
    layered = cfg.normalize.mode is normalize.NormMode.layer_norm
    sparsifier = per_row.LayerNormed.of(cfg.sae) if layered else cfg.sae
    evaluator = evaluate.make_evaluator(sparsifier, evaluate.light_metrics(cfg.sae), mesh)
    folded = jax.jit(lambda params, normalizer: fold.folded(cfg.sae, params, normalizer)[1])

    def run(train_state: state.TrainState) -> dict[str, float]:
        params, normalizer = train_state.chosen, train_state.normalizer
        if not json_yaml:
            params = folded(params, normalizer)
        return evaluator.evaluate(
            params,
            heldout(),
            mean=normalizer.mean if json_yaml else None,
            scale=normalizer.scale if json_yaml else None,
            batch_rows=cfg.train.batch,
        )

    return run


def write_record(
    cfg: config.Config, run_dir: Path, mesh: Mesh, rows: RowIterator, outcome: loop.Outcome, **more: Any
) -> None:
    """Content of run.json: versions, place and speed; `more` adds or replaces entries."""
    if jax.process_index() != 0:
        return
    record = {
        "saejax": VERSION,
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
        "python": platform.python_version(),
        "host": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "n_devices": jax.device_count(),
        "n_processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "git_commit": _git_commit(),
        "seed": cfg.seed,
        "data_seed": cfg.stream_seed,
        "source": cfg.source.fingerprint(),
        "epoch_rows": rows.n_rows,
        "skipped_shards": cfg.source.skipped(),
        "nonfinite_steps": len(list((run_dir / "nonfinite").glob("step_*.json"))),
        "step": outcome.step,
        "tokens": outcome.step * cfg.train.batch,
        "finished": outcome.signum is None,
        "finished_at": directory.now(),
        "peak_memory_bytes": memory.peak_bytes(),
        **outcome.speed,
        "seconds_before_resume": _seconds_so_far(run_dir),
        "evaluation": dict(outcome.evaluation),
        **more,
    }
    atomic.write(run_dir / "run.json", json.dumps(record, indent=1, default=str))


def _seconds_so_far(run_dir: Path) -> float:
    """Training time of this run before it was resumed."""
    before = directory.record(run_dir)
    return sum(before[key] for key in ("seconds", "seconds_before_resume") if isinstance(before.get(key), (int, float)))


def _git_commit() -> str | None:
    """Commit of the working directory, marked when there are uncommitted changes; None outside a repository."""
    command = ["git", "-C", str(SOURCES), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
