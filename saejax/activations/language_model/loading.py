"""Language model loading by path or name: a Hugging Face directory, a GGUF file, or the default."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.language_model import bos, families, gguf_file, gguf_tokenizer, hf, smollm2, weights
from saejax.activations.language_model.backend import LanguageModel
from saejax.activations.language_model.config import ModelConfig
from saejax.activations.language_model.file_tokenizer import FileTokenizer
from saejax.errors import UserError
from saejax.fields import paths
from saejax.parallel import sharding

_HASHED_BYTES = 4 * 2**30  # larger models are identified by the sizes of their files: hashing would take minutes


def load(
    path_or_name: str | pathlib.Path, mesh: Mesh | None = None, dtype: str | np.dtype | None = None
) -> LanguageModel:
    """A language model with its weights on the devices.

    Args:
      path_or_name: directory with config.json, safetensors, tokenizer.json; a `.gguf` file; or `smollm2`.
      mesh: axes `data` (batch) and `latent` (heads and MLP units); None is one device.
      dtype: float32, bfloat16 or float16, of the matrices; default float32 on CPU, else bfloat16.

    Returns:
      The model.

    Raises:
      UserError: nothing there, an architecture or a field that is not supported, or weights that do not fit.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    kept = _dtype(dtype, mesh)
    path, source, raw = _find(str(path_or_name))
    if isinstance(source, gguf_file.GGUFFile):
        tokenizer, files = gguf_tokenizer.build(source.metadata, path.name), [path]
        auto_bos = functools.partial(bos.of_gguf, metadata=source.metadata, name=path.name)
    else:
        tokenizer = hf.read_tokenizer(path)
        auto_bos = functools.partial(bos.of_files, config=raw, tokenizer_config=hf.read_tokenizer_config(path))
        files = [file for file in (path / "config.json", path / "tokenizer.json") if file.is_file()] + source.files
    config = _config(path, source, raw)
    state = weights.load(config, source, mesh=mesh, dtype=kept)
    provenance = _provenance(path, str(path_or_name), config.family, kept, files)
    read = None if tokenizer is None else FileTokenizer.of(tokenizer, auto_bos)
    return LanguageModel(config, state, tokenizer=read, provenance=provenance, mesh=mesh)


def read_config(path_or_name: str | pathlib.Path) -> ModelConfig:
    """The configuration of a model, its weights left on disk. See `load`."""
    return _config(*_find(str(path_or_name)))


def _config(
    path: pathlib.Path, source: hf.SafetensorsDirectory | gguf_file.GGUFFile, raw: dict[str, Any]
) -> ModelConfig:
    """The configuration, compared with the files' tensors before anything is made of its size."""
    where = path.name if isinstance(source, gguf_file.GGUFFile) else str(path / "config.json")
    config = families.model_config(raw, where, most_layers=max(1, len(source.shapes())))
    weights.check(config, source)
    return config


def _find(name: str) -> tuple[pathlib.Path, hf.SafetensorsDirectory | gguf_file.GGUFFile, dict[str, Any]]:
    """Path of a model, its weights, and the contents of its config.json."""
    path = smollm2.find() if name == smollm2.NAME else paths.local(name, "model")
    if path.is_dir():
        raw = hf.read_config(path)
        return path, hf.SafetensorsDirectory(path), raw
    if path.is_file() and path.suffix == ".gguf":
        source = gguf_file.GGUFFile(path)
        return path, source, source.hf_config()
    raise UserError(f"model={name!r} not found; allowed: a Hugging Face directory, a .gguf file, or {smollm2.NAME!r}")


def _dtype(dtype: str | np.dtype | None, mesh: Mesh) -> jnp.dtype:
    if dtype is None:
        return jnp.dtype("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
    if str(getattr(dtype, "name", dtype)) not in ("float32", "bfloat16", "float16"):
        raise UserError(f"model.dtype={dtype!r} is not supported, allowed: float32, bfloat16, float16")
    return jnp.dtype(dtype)


def _provenance(
    path: pathlib.Path, name: str, family: str, dtype: jnp.dtype, files: list[pathlib.Path]
) -> dict[str, Any]:
    """Identity of the weights, JSON-able; goes into the store's manifest and the run's record."""
    sizes = {file.name: file.stat().st_size for file in files}
    identity: dict[str, Any] = {"bytes": sizes}
    if sum(sizes.values()) <= _HASHED_BYTES:
        identity["sha256"] = {file.name: smollm2.file_sha256(file) for file in files}
    return {"name": name, "file": path.name, "family": family, "dtype": dtype.name, **identity}
