"""Facts that all processes of a run must share: what is done, with which config, code, devices and data.

`processes.agree` compares them. Anything that could make one process compute, draw, save or stop differently belongs
here. `_OWN` and `_OWN_OF_SOURCE` name what may differ.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from saejax import config
from saejax.errors import UserError
from saejax.fields import resume_policy
from saejax.parallel import processes
from saejax.storage import json_yaml
from saejax.storage.version import SOURCES, VERSION

logger = logging.getLogger(__name__)

_OWN = ("mesh.coordinator", "mesh.num_processes", "mesh.process_id", "tracker.")
"""Prefixes of keys that may differ: where a process finds the others (settled once they have met), and what process 0
alone does."""

_OWN_OF_SOURCE = {"path", "paths", "model", "corpus"}
"""Fields of a source that say where its data lie on this machine; the data themselves are compared."""

_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "flax")
_NUMERICS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_LONGEST = 120  # characters of a value in a line for people


def command(name: str, arguments: list[str]) -> dict[str, str]:
    """Description of a command line's work, as far as it is known before any config is read."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    where = {key: given[key] for key in ("resume", "hydra.run.dir", "hydra.sweep.dir", "run") if key in given}
    flags = sorted("-m" if a == "--multirun" else a for a in arguments if a.startswith("-") and "=" not in a)
    return {
        "command": " ".join([name, *flags, *("resume=" for key in where if key == "resume")]),
        **{key: value if "${" in value else os.path.abspath(value) for key, value in where.items()},
        **versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes, and a digest of this package's own source files."""
    sources, root = hashlib.sha256(), SOURCES
    for path in sorted(root.rglob("*.py")):
        sources.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    found = {f"version of {name}": metadata.version(name) for name in _LIBRARIES}
    python = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
    own = f"{VERSION} (sources {sources.hexdigest()[:12]})"
    return {"version of saejax": own, **found, "version of Python": python}


def of_config(cfg: Any) -> dict[str, str]:
    """Every key of a config but those that each process has for itself."""
    policy = resume_policy.of(cfg)
    facts = {}
    for key, value in _flat(config.to_plain(cfg)).items():
        place = policy.get(key) is resume_policy.Policy.place
        own = key.startswith("source.") and place and key.rpartition(".")[2] in _OWN_OF_SOURCE
        if not own and not key.startswith(_OWN):
            facts[key] = _said(value)
    return facts


def of_data(source: Any) -> dict[str, str]:
    """The identity of the rows, wherever they lie."""
    found = source.identity() if hasattr(source, "identity") else source.fingerprint()
    return {
        f"the data ({key})": _said(value)
        for key, value in _flat(found).items()
        if key.rpartition(".")[2] not in _OWN_OF_SOURCE
    }


def numerics() -> dict[str, str]:
    """Settings of JAX under which programs and draws differ, and the platforms that it may choose from."""
    found = {name: _said(getattr(jax.config, name)) for name in _NUMERICS}
    return found | {"JAX_PLATFORMS": _said(jax.config.jax_platforms or "")}  # pyright: ignore[reportAttributeAccessIssue]


def join(cfg: Any) -> None:
    """Join the other processes of the run that a config speaks of, and compare it with theirs. Safe to repeat.

    Args:
      cfg: with a `mesh`.

    Raises:
      UserError: in all processes alike, see `processes.start` and `processes.agree`.
    """
    joined = processes.several()
    cfg.mesh.start()
    if processes.several():
        processes.agree(versions() | of_config(cfg) | numerics())
        n_devices = jax.device_count()  # by all of them: each waits for the others' devices
        if not joined and processes.first():
            logger.info("%d processes, %d devices", jax.process_count(), n_devices)


def same_work(source: Any, **facts: Any) -> None:
    """Compare the data and whatever else is decided once devices and directories were looked at.

    Args:
      source: an `ActivationSource`; one that a single process cannot open ends all.
      **facts: name, its underscores written as spaces -> value.

    Raises:
      UserError: in all processes alike.
    """
    if not processes.several():
        return
    with processes.alike():
        found = of_data(source)
    processes.agree({name.replace("_", " "): _said(value) for name, value in facts.items()} | found)


def tell_others(arguments: list[str], error: BaseException) -> None:
    """Tells the other processes why this one ends before it has joined them, so that they end as well.

    Args:
      arguments: of its command.
      error: what ended it.
    """
    processes.give_up(_place(arguments), error)


def _place(arguments: list[str]) -> processes.Place | None:
    """Meeting place that a failed command line would have used, as far as that is known."""
    given = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    how = given.get("mesh.distributed")
    if how is None and "resume" in given:
        try:
            how = json_yaml.read_run_config(Path(given["resume"]))["mesh"]["distributed"]
        except (UserError, OSError, KeyError, TypeError):
            how = "auto"  # whoever else goes on with this run has the environment for it
    numbers = {}
    for name in ("num_processes", "process_id"):
        value = given.get(f"mesh.{name}", "null")
        numbers[name] = int(value) if value.isdecimal() else None
    try:
        known = processes.Distributed[how or "none"]
        return processes.place(known, coordinator=given.get("mesh.coordinator"), **numbers)
    except KeyError:
        return None
    except UserError:  # perhaps it is its number that is wrong; then it can still say so
        where, number = given.get("mesh.coordinator", os.environ.get("JAX_COORDINATOR_ADDRESS")), numbers["process_id"]
        if where is None or number is None or not re.fullmatch(r"\S+:\d{1,5}", where):
            return None
        return processes.Place(known, number, max(2, number + 1), where)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _said(value: Any) -> str:
    """A value as one types it; long ones, say of hundreds of shards, by their beginning and a digest."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
