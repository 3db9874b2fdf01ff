"""Training of an ensemble: configs of its members to one run directory each, continued where they stand.

Every member gets an ordinary run directory, as if it had been trained alone. So evaluation, export, report and
resuming one member need to know nothing of ensembles. While they train, members hold their shared state once. The loop
is that of one run: `_Members` takes the place of its tracker, evaluation and checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import config
from saejax.activations.source import RowIterator
from saejax.errors import UserError
from saejax.fields import paths
from saejax.parallel import processes, sharding
from saejax.runs import agreement, directory, run
from saejax.runs.directory import Action, Request
from saejax.storage import checkpoint, lock, tracking
from saejax.training import ensemble, ensemble_config, flops, loop, memory, settings

logger = logging.getLogger(__name__)

Members = Mapping[Path, config.Config]

FOLDS = "runs fold where they differ only in seed (with data_seed set), optim.lr, sae.k or a coefficient"
"""Said of a run that does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a call of `train`."""

    evaluations: dict[Path, dict[str, float]]
    """Run directory -> last held-out metrics, of members that are finished."""
    failed: list[Path]
    """Directories of members that are no longer finite, now or before."""
    signum: int | None = None
    """The signal that stopped it, None when it reached its end."""
    tokens_per_second: float = 0.0
    """Rows per second of the stream, each row seen by every member; 0 where nothing was left to do."""


def train(cfg: config.Config, run_dir: Path, *, resume: bool = False) -> Result:
    """Train the ensemble of a config; the members lie in `run_dir`/members/.

    Args:
      cfg: with a non-empty `ensemble`.
      run_dir: made where missing.
      resume: whether `cfg` may differ from what is there, as with `saejax train resume=...`.

    Returns:
      How it ended. Finished members are left alone, others continue from their newest common step, new ones begin.

    Raises:
      UserError: before any device work for impossible combinations; for lack of memory or a full disk; when no member
        is finite any more.
    """
    run_dir = paths.local(run_dir, "run_dir")
    agreement.same_work(cfg.source, resume=resume, devices=jax.device_count())
    config.check_data(cfg)
    with contextlib.ExitStack() as stack:
        with processes.alike():
            if processes.first():
                stack.enter_context(lock.hold(run_dir, "saejax train", again=True))
        directory.decide(cfg, run_dir, Request.resume if resume else Request.same)
        members = ensemble_config.dirs(cfg, run_dir)
        left = any((directory.look(c, path).step or 0) < c.train.n_steps for path, c in members.items())
        if left or not resume:  # where nothing is left to do, it stays the ensemble that its own command line names
            directory.write_config(cfg, run_dir)
        return train_members(members, form=cfg.ensemble.form, n_axis=cfg.mesh.ensemble, resume=resume)


def train_members(
    members: Members,
    *,
    form: ensemble_config.Form = ensemble_config.Form.auto,
    n_axis: int = 1,
    resume: bool = False,
) -> Result:
    """Train runs that differ in `KNOBS` only, each into its own directory.

    Args:
      members: run directory -> config.
      form: of the compiled step.
      n_axis: devices along the mesh axis of members.
      resume: as in `train`.
    """
    members = {paths.local(path, "run_dir"): cfg for path, cfg in members.items()}
    evaluations: dict[Path, dict[str, float]] = {}
    failed: list[Path] = []
    fresh: dict[Path, config.Config] = {}
    begun: dict[Path, config.Config] = {}
    with contextlib.ExitStack() as stack:
        with processes.alike():
            for path in members if processes.first() else ():
                stack.enter_context(lock.hold(path, "saejax train", again=True))
        for path, cfg in members.items():
            found = directory.decide(cfg, path, Request.member_resume if resume else Request.member)
            match found.action:
                case Action.leave_out:
                    said, again = found.state.record["failed"], paths.typed("resume", path)
                    logger.warning("%s is left out: %s; it continues alone with %s", path, said, again)
                    failed.append(path)
                case Action.skip:
                    evaluations[path] = found.state.record.get("evaluation", {})
                case Action.go_on:
                    begun[path] = cfg
                case Action.start:
                    fresh[path] = cfg
        result = Result(evaluations=evaluations, failed=failed)
        for cohort, begins in ((begun, False), (fresh, True)):
            if not cohort or result.signum is not None:
                continue
            now = _together(cohort, form=form, n_axis=n_axis if len(cohort) % n_axis == 0 else 1, resume=not begins)
            result = Result(
                evaluations=result.evaluations | now.evaluations,
                failed=result.failed + now.failed,
                signum=now.signum,
                tokens_per_second=now.tokens_per_second,
            )
    return result


def _together(members: Members, *, form: ensemble_config.Form, n_axis: int, resume: bool) -> Result:
    """Members that all begin, or all continue: one stream, one compiled step."""
    cfgs = list(members.values())
    cfg, n = cfgs[0], len(cfgs)
    varied = {
        name
        for name in ensemble_config.places(cfgs[0].sae)
        if len({repr(ensemble_config.knobs(c).get(name)) for c in cfgs}) > 1
    }
    platform = jax.devices()[0].platform
    form = ensemble_config.resolved(form, cfg.sae, varied, n_axis=n_axis, platform=platform)
    shape = dataclasses.replace(cfg.mesh, ensemble=n_axis).shape(jax.device_count(), n_lanes=cfg.train.n_lanes)
    mesh = sharding.make_mesh(*shape, n_ensemble=n_axis)
    sharding.check_divides(mesh, n_lanes=cfg.train.n_lanes, d_sae=cfg.sae.d_sae)
    rows, put = run.open_stream(cfg, mesh)
    learners = [run.learner(one) for one in cfgs]
    logger.info("%d members in one step (ensemble.form=%s)", n, form.name)
    with contextlib.ExitStack() as stack:
        owners = {path: directory.take(c, path, resume, stack) for path, c in members.items()}
        # One spare, so that the newest step that all have is never deleted while some of them write the next.
        saved = [checkpoint.Checkpoints(path, c.checkpoint, owners[path], spare=1) for path, c in members.items()]
        for one in saved:
            stack.callback(one.close)
        records = [next(rows)] if resume else run.first_filling(cfg, rows)
        first = records[0]
        single = learners[0].abstract(run.filling(cfg, first), mesh)
        run.check_room(cfg, list(members), single)
        layout = ensemble.Layout(single, n, form, mesh)
        made = ensemble.make(learners, form, mesh)
        lane_sharding = NamedSharding(mesh, P(sharding.DATA))
        compiled = memory.compile_step(made, layout.abstract, lane_sharding, mesh, n_members=n)
        if resume:
            states, position = _restored(saved, members, single)
            rows.set_state(position)
        else:
            filled = run.fill(cfg, records, put)
            seeds = [c.seed for c in cfgs]
            states = learners[0].create(filled, mesh, seeds=seeds, data_seed=cfg.stream_seed)
            del filled
        begun = layout.join(states)
        del states
        for path, c in members.items():
            directory.begin(c, path, owners[path], int(begun.step))
        group: Any = _Members(members, layout, saved, mesh, rows, start_step=int(begun.step))
        stack.callback(group.close)
        outcome = loop.fit(
            begun,  # pyright: ignore[reportArgumentType]
            compiled,
            rows,
            loop.Surroundings(
                put=put,
                evaluate=group.evaluate,
                checkpoints=group,
                tracker=group,
                inspect=run.inspector(cfg, next(iter(members)), mesh, rows, first),
            ),
            config=cfg.train,
            save_every_steps=cfg.checkpoint.save_every_steps,
            work=flops.work(cfg.sae, n * cfg.train.batch, mesh.size, measure=cfg.train.measure_peak),
            profile=next(iter(members)) / "profile" if cfg.train.profile and jax.process_index() == 0 else None,
        )
    return group.recorded(outcome)


def _restored(saved: list[checkpoint.Checkpoints], members: Members, single: Any) -> tuple[list[Any], dict[str, Any]]:
    """The states of all members at the newest step that each of them has and that can be read."""
    common = set.intersection(*(set(checkpoint.steps(path)) for path in members))
    problem = "their checkpoints have no step in common"
    for number in sorted(common, reverse=True):
        states, position = [], None
        try:
            for one in saved:
                found, position = one.restore(single, number)
                states.append(dataclasses.replace(found, buffer=None) if states else found)
        except UserError as error:
            problem = str(error)
            logger.warning("the members do not continue from step %d: %s", number, problem)
            continue
        assert position is not None
        for one in saved:
            one.rewind(number)
        return states, position
    alone = paths.typed("resume", next(iter(members)))
    raise UserError(f"the members cannot continue together: {problem}; each continues alone with {alone}")


class _Members:
    """The tracker, the evaluation and the checkpoints of an ensemble, as the loop of one run wants them.

    A member whose loss or parameters are not finite is reported at once, and no longer logged or saved; the others
    continue. Its arrays stay in the step, which is compiled once.

    Args:
      members: run directory -> config.
      layout: between the state of the ensemble and that of a member.
      saved: checkpoints of each.
      mesh: where they train.
      rows: the stream, for the record.
      start_step: optimiser steps taken before.
    """

    def __init__(
        self,
        members: Members,
        layout: ensemble.Layout,
        saved: list[checkpoint.Checkpoints],
        mesh: Mesh,
        rows: RowIterator,
        start_step: int,
    ) -> None:
        self._paths, self._cfgs = list(members), list(members.values())
        self._layout, self._saved, self._mesh, self._rows = layout, saved, mesh, rows
        self._live = list(range(len(self._paths)))
        self._evaluated: list[dict[str, float]] = [{} for _ in self._paths]
        first = self._cfgs[0]
        enabled = jax.process_index() == 0
        self._trackers = [
            tracking.Tracker(path, cfg.tracker, config.to_plain(cfg), start_step=start_step, enabled=enabled)
            for path, cfg in members.items()
        ]
        self._heldout: list[np.ndarray] = []
        self._evaluations = [
            run.evaluation(dataclasses.replace(cfg, sae=_measured(cfg, first)), mesh, lambda: self._heldout)
            for cfg in self._cfgs
        ]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line into the log of every member: its own metrics, and the shared ones."""
        own: dict[int, dict[str, float]] = {i: {} for i in self._live}
        shared = {}
        for key, value in values.items():
            group, _, rest = key.partition("/")
            member, _, name = rest.partition("/")
            if not member.isdigit():
                shared[key] = value
            elif int(member) in own:
                own[int(member)][f"{group}/{name}"] = value
        for i, found in own.items():
            self._trackers[i].log(step, shared | found)
            if not all(math.isfinite(found.get(f"train/{name}", 0.0)) for name in ("loss", "param_norm")):
                self._fail(i, step)

    def evaluate(self, state: ensemble.EnsembleState) -> dict[str, float]:
        """Held-out metrics "i/name" of every member, and their means; the rows are read once."""
        self._check(state)
        cfg = self._cfgs[0]
        self._heldout = list(cfg.source.heldout(cfg.train.batch, cfg.train.eval_rows))
        for i in self._live:
            self._evaluated[i] = dict(self._evaluations[i](self._layout.take(state, i)))
        self._heldout = []
        measured = {i: self._evaluated[i] for i in self._live}
        names = next(iter(measured.values()), {})
        means = {name: float(np.mean([found[name] for found in measured.values()])) for name in names}
        return means | {f"{i}/{name}": value for i, found in measured.items() for name, value in found.items()}

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved of all members that are finite."""
        latest = [self._saved[i].latest_step for i in self._live]
        known = [step for step in latest if step is not None]
        return min(known) if latest and len(known) == len(latest) else None

    def save(self, step: int, state: ensemble.EnsembleState, loader: dict[str, Any], fvu: float | None) -> None:
        """As `Checkpoints.save`, of every member that is finite; the save before is complete for all by then."""
        self._check(state)
        for i in self._live:
            self._saved[i].wait()
        for i in self._live:
            own = None if fvu is None else self._evaluated[i].get("fvu")
            self._saved[i].save(step, self._layout.take(state, i), loader, own)

    def ensure(self, step: int, state: ensemble.EnsembleState, loader: dict[str, Any], fvu: float | None) -> None:
        """As `Checkpoints.ensure`, of every member that is finite; the spare checkpoint is gone afterwards."""
        self.save(step, state, loader, fvu)
        for i in self._live:
            own = None if fvu is None else self._evaluated[i].get("fvu")
            self._saved[i].ensure(step, self._layout.take(state, i), loader, own)
        for i in self._live:
            self._saved[i].trim()

    def recorded(self, outcome: loop.Outcome) -> Result:
        """Write run.json of every member, and say how all of it ended."""
        for i in self._live:
            path, own = self._paths[i], dataclasses.replace(outcome, evaluation=self._evaluated[i])
            if outcome.speed["steps"] or not (path / "run.json").exists():
                run.write_record(self._cfgs[i], path, self._mesh, self._rows, own, ensemble_members=len(self._paths))
        done = {} if outcome.signum is not None else {self._paths[i]: self._evaluated[i] for i in self._live}
        failed = [path for i, path in enumerate(self._paths) if i not in self._live]
        speed = outcome.speed["tokens_per_second"] if outcome.speed["steps"] else 0.0
        return Result(evaluations=done, failed=failed, signum=outcome.signum, tokens_per_second=speed)

    def close(self) -> None:
        """Close every log."""
        for tracker in self._trackers:
            tracker.close()

    def _check(self, state: ensemble.EnsembleState) -> None:
        finite = np.asarray(jax.device_get(state.finite))
        for i in [i for i in self._live if not finite[i]]:
            self._fail(i, int(state.step))

    def _fail(self, i: int, step: int) -> None:
        self._live.remove(i)
        latest = self._saved[i].latest_step
        said = f"not finite at step {step}: lower optim.lr; its last checkpoint is of step {latest}"
        logger.error("%s is %s. The other members continue", self._paths[i], said)
        ended = loop.Outcome(None, step, None, self._evaluated[i], {})  # pyright: ignore[reportArgumentType]
        path, more = self._paths[i], {"finished": False, "failed": said, "ensemble_members": len(self._paths)}
        run.write_record(self._cfgs[i], path, self._mesh, self._rows, ended, **more)


def _measured(cfg: config.Config, first: config.Config) -> Any:
    """The architecture of a member without its coefficients, which no metric reads: so members share a program."""
    own = {name: getattr(first.sae, name) for name in first.sae.knobs if name != "k"}
    return dataclasses.replace(cfg.sae, **own)


def groups(members: Members) -> Iterator[dict[Path, config.Config]]:
    """Runs sorted into those that can be trained together: they differ in knobs only and draw the same batches.

    Args:
      members: run directory -> config of ordinary runs.
    """
    found: dict[str, dict[Path, config.Config]] = {}
    for path, cfg in members.items():
        if cfg.train.on_nonfinite is not settings.OnNonfinite.stop or cfg.ensemble.points:
            found[str(path)] = {path: cfg}
            continue
        same = dict.fromkeys(ensemble_config.knobs(cfg) | {"seed": 0}, 0)
        plain = config.to_plain(cfg) | {"stream": cfg.stream_seed, "data_seed": None}
        for name in same:
            part, field = ensemble_config.places(cfg.sae)[name]
            (plain[part] if part else plain)[field] = None
        found.setdefault(json.dumps(plain, sort_keys=True, default=str), {})[path] = cfg
    yield from found.values()
