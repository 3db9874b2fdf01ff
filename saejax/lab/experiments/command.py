"""`saejax experiment`: list the experiments, run one, or run every quick form and print one table."""

from __future__ import annotations

import inspect
import logging
import time
from pathlib import Path
from typing import Any

from saejax import config
from saejax.errors import UserError
from saejax.fields import command_line, key_value, paths
from saejax.lab.experiments import all_experiments, figures, harness
from saejax.storage import atomic

logger = logging.getLogger(__name__)

ALL_QUICK = "all_quick"

EXAMPLES = (
    "saejax experiment                              every experiment, what it shows and how long it takes",
    "saejax experiment synth/sb_iid quick=true",
    "saejax experiment synth/l1_knee_shrinkage seed=1 out=runs/knee",
    "saejax experiment all_quick                    all of them, small, in one table",
)


def listing() -> str:
    """Every experiment: name, expected seconds on two CPU cores (full, quick), one line."""
    found = all_experiments()
    width = max((len(name) for name in found), default=0)
    lines = [f"{'experiment':<{width}}  {'full':>6} {'quick':>6}  what it shows (times on two CPU cores)"]
    lines += [
        f"{name:<{width}}  {_duration(cls.cpu_seconds[0]):>6} {_duration(cls.cpu_seconds[1]):>6}  {cls.summary}"
        for name, cls in found.items()
    ]
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in EXAMPLES)])


def execute(arguments: list[str]) -> int:
    """Run the experiment of a command line.

    Args:
      arguments: [NAME, key=value ...] with the fields of the experiment, `quick=true` and `out=DIR`; or all_quick,
        with `out=DIR` and `only=PREFIX`.

    Returns:
      0 where every check passed, 1 where one failed.

    Raises:
      UserError: no such experiment, key or value.
    """
    name, *overrides = arguments
    loose = [a for a in overrides if "=" not in a]
    if loose or "=" in name:
        raise UserError(f"experiment NAME key=value ..., got {key_value.shown(loose[0] if loose else name)}")
    if name == ALL_QUICK:
        return _all_quick(overrides)
    found = all_experiments()
    if name not in found:
        near = command_line.near(name, [*found, ALL_QUICK])
        raise UserError(f"no experiment {name}; there are {', '.join([*found, ALL_QUICK])}{near}")
    quick, overrides = _take(overrides, "quick", "false")
    if quick.lower() not in ("true", "false"):
        raise UserError(f"quick must be true or false, got {quick}")
    out, overrides = _out(overrides, f"{_stamped()}/{_folder(name)}")
    start = found[name]().quick() if quick.lower() == "true" else found[name]()
    outcome = harness.run_experiment(config.override(start, overrides), out)
    print(f"{'every check passed' if outcome.passed else 'A CHECK FAILED'}; figure and numbers: {out}")
    return 0 if outcome.passed else 1


def describe(name: str, field_docs: Any) -> str:
    """Help of one experiment: its docstring and every key with its values in full and in quick form.

    Args:
      name: of the experiment.
      field_docs: class -> {field: documentation}.
    """
    found = all_experiments()
    if name not in found:
        raise UserError(f"no experiment {name}; there are {', '.join([*found, ALL_QUICK])}")
    cls = found[name]
    full, quick = config.to_plain(cls()), config.to_plain(cls().quick())
    lines = [f"usage: saejax experiment {name} [key=value ...] [quick=true] [out=DIR]", "", cls.summary, ""]
    lines += [inspect.getdoc(cls) or "", "", "keys, set as key=value:"]
    for key, text in field_docs(cls).items():
        if key not in full:  # what the class says of itself, no key
            continue
        small = "" if quick[key] == full[key] else f"    (quick: {quick[key]})"
        lines += [f"    {key} = {full[key]}{small}", f"        {text}"]
    return "\n".join(lines)


def _all_quick(overrides: list[str]) -> int:
    """Every quick form, one table; an experiment that breaks counts as failed and does not stop the others."""
    out, overrides = _out(overrides, _stamped())
    only, overrides = _take(overrides, "only", "")
    if overrides:
        raise UserError(f"{ALL_QUICK} takes out=DIR and only=PREFIX, got {overrides[0]}")
    chosen = {name: cls for name, cls in all_experiments().items() if name.startswith(only)}
    if not chosen:
        raise UserError(f"only={only}: no experiment begins so; there are {', '.join(all_experiments())}")
    rows: list[tuple[str, harness.Check]] = []
    begun = time.perf_counter()
    for name, cls in chosen.items():
        start = time.perf_counter()
        try:
            outcome = harness.run_experiment(cls().quick(), out / _folder(name), echo=False)
            rows += [(name, check) for check in outcome.checks]
        except Exception as error:
            logger.exception("%s broke", name)
            broken = f"{type(error).__name__}: {error}".splitlines()[0][:80]
            rows.append((name, harness.Check(quantity=broken, measured=float("nan"), low=0.0, source="it broke")))
        logger.info("%s: %.0f s", name, time.perf_counter() - start)
    text = harness.table(rows, sources=False)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(out / "table.txt", harness.table(rows) + "\n")
    n_failed = sum(not check.passed for _, check in rows)
    n_judged = sum(check.verdict in ("pass", "FAIL") for _, check in rows)
    print(text)
    verdict = f"{n_failed} of {n_judged} checks FAILED" if n_failed else f"all {n_judged} checks passed"
    missing = sum(check.verdict == "not built" for _, check in rows)
    verdict += f", {missing} not built" if missing else ""
    print(f"{verdict}; {len(chosen)} experiments in {_duration(round(time.perf_counter() - begun))}; figures: {out}")
    return 1 if n_failed else 0


def _take(overrides: list[str], key: str, default: str) -> tuple[str, list[str]]:
    """The last value of `key=` and the overrides without it."""
    values = [a.removeprefix(f"{key}=") for a in overrides if a.startswith(f"{key}=")]
    return (values[-1] if values else default), [a for a in overrides if not a.startswith(f"{key}=")]


def _out(overrides: list[str], default: str) -> tuple[Path, list[str]]:
    """The folder of `out=`, which can be written, and the overrides without it."""
    said, others = _take(overrides, "out", default)
    out = paths.local(said, "out")
    atomic.check_place(out)
    figures.check()
    return out, others


def _folder(name: str) -> str:
    return name.replace("/", "_")


def _stamped() -> str:
    return f"runs/experiments_{time.strftime('%Y-%m-%d_%H%M%S')}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
