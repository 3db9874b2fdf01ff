"""Experiment base class: a config that runs, the checks of its numbers against expectations, and its files.

An experiment module defines frozen dataclasses derived from `Experiment` and decorated with `register`. It imports
matplotlib and scikit-learn only inside functions, so that listing all experiments is quick.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax
import numpy as np

from saejax import config
from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.lab.experiments import figures
from saejax.storage import atomic, lock

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENTS: dict[str, type[Experiment]] = {}
"""Every experiment by its name; `experiments.all_experiments()` fills it."""

_T = TypeVar("_T", bound=type["Experiment"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One measured number, the interval it is expected in, and who says so.

    Examples:
      >>> check = Check(quantity="dictionary MCC", measured=0.995, low=0.99, source="independent NumPy reference run")
      >>> check.passed, check.verdict, check.wanted
      (True, 'pass', '>= 0.99')
    """

    quantity: str
    """What was measured, with its unit where it has one."""
    measured: float | None
    """The number; None where the arm does not exist in this version."""
    low: float = -math.inf
    """Smallest value that passes."""
    high: float = math.inf
    """Largest value that passes. With neither bound the number is shown and not judged."""
    expected: str = ""
    """How the expectation reads in the table; empty writes the bounds."""
    source: str
    """Paper and place, or reference run, that the expectation comes from."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong: inside the bounds and finite, or not judged at all."""
        return self.verdict != "FAIL"

    @property
    def verdict(self) -> str:
        """pass, FAIL, "not built", or "-" where there is nothing to judge."""
        if self.measured is None:
            return "not built"
        if self.low == -math.inf and self.high == math.inf:
            return "-"
        return "pass" if math.isfinite(self.measured) and self.low <= self.measured <= self.high else "FAIL"

    @property
    def wanted(self) -> str:
        """The expectation as text."""
        if self.expected:
            return self.expected
        if self.low > -math.inf and self.high < math.inf:
            return f"{self.low:.4g} to {self.high:.4g}"
        if self.low > -math.inf:
            return f">= {self.low:.4g}"
        return f"<= {self.high:.4g}" if self.high < math.inf else "-"


def near(quantity: str, measured: float, target: float, tolerance: float, source: str) -> Check:
    """A check that `measured` is within `tolerance` of `target`.

    Examples:
      >>> near("gamma", 0.91, 0.909, 0.004, "closed form 2 / (2 + t)").wanted
      '0.909 +- 0.004'
    """
    return Check(
        quantity=quantity,
        measured=measured,
        low=target - tolerance,
        high=target + tolerance,
        expected=f"{target:.4g} +- {tolerance:.4g}",
        source=source,
    )


@dataclasses.dataclass
class Outcome:
    """Result of an experiment."""

    values: dict[str, Any]
    """Every number behind the figure and the checks, JSON-able after `plain`."""
    checks: list[Check]
    """The rows of its table."""
    figure: Figure | None = None
    """Its figure, made with `figures`."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(abc.ABC):
    """One claim, end to end: static and printable; the fields are what `saejax experiment NAME key=value` sets."""

    name: ClassVar[str]
    """family/claim, as on the command line."""
    summary: ClassVar[str]
    """One line for the list of experiments."""
    cpu_seconds: ClassVar[tuple[int, int]]
    """Expected time on two CPU cores: in full, and of `quick()`."""

    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Counts of which 0 has a meaning."""

    in_formulas: ClassVar[tuple[str, ...]] = ()
    """Counts that only formulas see, on the host: they may exceed what a device counts."""

    seed: int = 0
    """Fixes every draw of the experiment."""

    def __post_init__(self) -> None:
        """Refuses counts below 1, numbers that are not finite and empty lists; each experiment knows the rest."""
        numeric.check(self, on_host=self.in_formulas)
        if self.seed > numeric.LARGEST:
            raise UserError(
                f"seed must be at most {numeric.LARGEST}, since experiments count on from it, got {self.seed}"
            )
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, list):  # command lines and YAML know lists only
                value = tuple(value)
                object.__setattr__(self, name, value)
            if value == ():
                raise UserError(f"{name} = []: one or more are needed")
            least = 0 if name in ("seed", *self.may_be_zero) else 1
            for number in value if isinstance(value, tuple) else (value,):
                if type(number) is int and number < least:
                    raise UserError(f"{name} = {number}: at least {least} is needed")
        if getattr(self, "learning_rate", 1) <= 0:
            raise UserError(f"learning_rate = {vars(self)['learning_rate']}: a number above 0 is needed")

    @abc.abstractmethod
    def quick(self) -> Self:
        """A smaller copy whose checks still hold."""

    @abc.abstractmethod
    def run(self) -> Outcome:
        """Measure."""


def register(cls: _T) -> _T:
    """Class decorator: enters an experiment under its `name`."""
    EXPERIMENTS[cls.name] = cls
    return cls


def run_experiment(experiment: Experiment, out_dir: str | Path, *, echo: bool = True) -> Outcome:
    """Run one experiment and leave its record in a directory.

    Args:
      experiment: what to run.
      out_dir: made where missing; gets config.yaml, metrics.json, table.txt, figure.png and figure.svg.
      echo: print the table.

    Returns:
      The outcome, its figure already saved; `values["seconds"]` is the wall time of the run.

    Raises:
      UserError: the directory holds another experiment, or one is at work there.
    """
    out_dir = paths.local(out_dir, "out")
    with lock.hold(out_dir, f"saejax experiment {experiment.name}"):
        return _run_in(experiment, out_dir, echo)


def _run_in(experiment: Experiment, out_dir: Path, echo: bool) -> Outcome:
    record = out_dir / "config.yaml"
    head = f"type: {experiment.name}\n"
    if record.exists() and not record.read_text(encoding="utf-8").startswith(head):
        raise UserError(f"out={out_dir} holds something else than {experiment.name}: take another directory")
    atomic.write(record, config.to_yaml(experiment))
    start = time.perf_counter()
    outcome = experiment.run()
    outcome.values.setdefault("seconds", time.perf_counter() - start)
    text = table([(experiment.name, check) for check in outcome.checks])
    atomic.write(out_dir / "table.txt", text + "\n")
    metrics = {
        "experiment": experiment.name,
        "passed": outcome.passed,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "values": outcome.values,
        "checks": [
            dataclasses.asdict(check) | {"wanted": check.wanted, "verdict": check.verdict} for check in outcome.checks
        ],
    }
    atomic.write(out_dir / "metrics.json", json.dumps(plain(metrics), indent=1, allow_nan=False))
    if outcome.figure is not None:
        figures.save(outcome.figure, out_dir / "figure")
    if echo:
        print(text)
    return outcome


def table(rows: Iterable[tuple[str, Check]], *, sources: bool = True) -> str:
    """Checks as text: experiment, quantity, expected, measured, verdict and, where asked for, the source.

    Args:
      rows: (name of the experiment, check).
      sources: whether the last column says where each expectation comes from.
    """
    header = ["experiment", "quantity", "expected", "measured", "verdict", "source"]
    cells = [
        [name, c.quantity, c.wanted, "-" if c.measured is None else f"{c.measured:.4g}", c.verdict, c.source]
        for name, c in rows
    ]
    cells = [row if sources else row[:-1] for row in [header, *cells]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plain(value: Any) -> Any:
    """A value for JSON: arrays become lists, keys strings, values that are not finite null.

    Examples:
      >>> plain({1: np.array([1.0, np.nan]), "n": np.int32(3)})
      {'1': [1.0, None], 'n': 3}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
