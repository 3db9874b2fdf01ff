"""saejax: train sparse autoencoders on neural-network activations, on any number of devices, in JAX.

Examples:
  >>> import saejax
  >>> sae = saejax.load("runs/topk")                                 # doctest: +SKIP
  >>> latents = sae.encode(x)                                        # doctest: +SKIP
  >>> saejax.evaluate(sae, x)["fvu"]                                 # doctest: +SKIP
  >>> saejax.export(sae, "out/", format="saelens")                   # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["UserError", "__version__", "evaluate", "export", "load", "register"]

from saejax.errors import UserError
from saejax.storage.version import VERSION as __version__

if TYPE_CHECKING:
    from saejax.sae.model import SAE

_T = TypeVar("_T")


def load(path: str | os.PathLike[str], step: int | None = None) -> SAE:
    """The SAE of a run directory, or of a file or directory in any supported foreign format.

    Args:
      path: run directory as written by `saejax train`, or an export.
      step: checkpoint of a run; None takes the newest.

    Returns:
      An SAE on one device that works in the data's own scale: `encode`, `decode`, call it; `.config`, `.params`,
      `.provenance`.

    Raises:
      UserError: nothing there that is understood.
    """
    from saejax import interop
    from saejax.fields import paths

    path = paths.local(path, "path")
    if (path / "config.yaml").is_file() and not interop.circuit_tracer.detect(path):
        from saejax.runs import run

        return run.load(path, step)
    return interop.load(path)


def evaluate(sae: SAE, activations: Any, **settings: Any) -> dict[str, float]:
    """The held-out metrics of one SAE on any array, source or iterable of arrays.

    Args:
      sae: as from `load`.
      activations: array [..., d_in], an `ActivationSource`, blocks of rows, or the path of a .npy or .safetensors file
        or of a directory of .npy files.
      **settings: of `saejax.evals.evaluate.evaluate`: batch_rows, max_rows, metrics, mesh.

    Returns:
      Numbers by name; `.arrays` and `.definitions` beside them.
    """
    from saejax.evals import evaluate as evaluation

    if isinstance(activations, (str, os.PathLike)):
        from saejax.runs import run_data

        activations = run_data.rows(activations, sae)
    return evaluation.evaluate(sae, activations, **settings)


def export(sae: SAE, path: str | os.PathLike[str], format: str = "saelens") -> Any:
    """Write an SAE in another tool's format.

    Args:
      sae: as from `load`.
      path: directory to write.
      format: saelens, dictionary_learning or sparsify.

    Returns:
      The directory.
    """
    from saejax import interop

    return interop.export(sae, path, format)


def register(thing: _T) -> _T:
    """Enter an architecture, source, text, metric or format of your own under its `name`; a class decorator.

    From then on configs, commands, sweeps and checkpoints know it, as they know those of saejax.

    Args:
      thing: a class derived from `saejax.sae.base.Sparsifier`, `saejax.activations.source.ActivationSource`,
        `saejax.activations.text.TextCorpus` or `saejax.evals.metric.Metric`; or a module or object that is a
        `saejax.interop.Format`.

    Returns:
      The same thing.

    Raises:
      UserError: it is none of these, its name is taken, or it lacks something.
    """
    from saejax.fields import registry

    if not isinstance(thing, type):
        from saejax import interop as interop  # where formats are known; of a class its base class is imported
    return registry.register(thing)
