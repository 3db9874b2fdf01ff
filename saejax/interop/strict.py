"""Checks shared by all formats: files parse, keys are known, shapes fit, numbers are finite.

Every function raises a UserError of one line that names the file and the key.
"""

import dataclasses
import json
import math
import pathlib
import tokenize
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from saejax.errors import UserError
from saejax.interop import torch_file
from saejax.sae import EncoderKind, base
from saejax.sae.layout import Family
from saejax.storage.json_yaml import one_line, read_json, read_yaml

__all__ = ["one_line", "read_json", "read_yaml"]  # of saejax.storage.json_yaml, which every format reads with

Shapes = Mapping[str, tuple[int, ...]]
_MOST_EXPANSION, _ANY_EXPANSION = 100, 2**24
"""Limits on the growth of a compressed archive: a multiple of its size, and bytes allowed in any case."""


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a safetensors file."""
    try:
        return safetensors.numpy.load_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error})") from None


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of an .npz file, none of which may be a pickle or larger than what the file holds."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with zipfile.ZipFile(path) as archive:
            expanded = sum(info.file_size for info in archive.infolist())
            if expanded > _MOST_EXPANSION * path.stat().st_size + _ANY_EXPANSION:
                raise ValueError(f"it would expand to {expanded} bytes")
            return {info.filename.removesuffix(".npy"): _read_npy(archive, info) for info in archive.infolist()}
    except (*torch_file.DAMAGE, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: no .npz file of plain arrays ({one_line(error)})") from None


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, after its header is found to say as much as there is."""
    with archive.open(info) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_column, dtype = versions[np.lib.format.read_magic(file)](file)
        if dtype.kind not in "fiub":
            raise ValueError(f"{info.filename} holds {dtype}, and no pickle is read")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{info.filename} does not hold an array of shape {shape}")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if by_column else "C")


def same_keys(where: pathlib.Path, found: set[str], wanted: set[str], optional: Collection[str] = ()) -> None:
    """Refuses keys outside `wanted` and `optional`, and the lack of any of `wanted` that is not optional."""
    optional = set(optional)
    unknown, missing = sorted(found - wanted - optional), sorted(wanted - optional - found)
    if unknown or missing:
        wrong = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
        raise UserError(f"{where}: {'; '.join(wrong)} (allowed: {', '.join(sorted(wanted | optional))})")


def arrays(
    where: pathlib.Path, weights: Mapping[str, np.ndarray], shapes: Shapes, integers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Returns `weights` as float32 (as they are for `integers`): exactly the keys and shapes of `shapes`, finite."""
    same_keys(where, set(weights), set(shapes))
    checked = {}
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != tuple(shape):
            raise UserError(f"{where}: {name} must have shape {tuple(shape)}, got {array.shape}")
        kind = np.integer if name in integers else np.floating
        if not jnp.issubdtype(array.dtype, kind):
            wanted = "of integers" if name in integers else "floating point"
            raise UserError(f"{where}: {name} must be {wanted}, got {array.dtype}")
        if name not in integers:
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise UserError(f"{where}: {name} must be finite in float32, {_bad(array)}")
        checked[name] = array
    return checked


def sizes(
    where: pathlib.Path, weights: Mapping[str, np.ndarray], name: str, transposed: bool = False
) -> tuple[int, int]:
    """Returns (d_in, d_sae) as the matrix `name` [d_in, d_sae] has them (`transposed`: [d_sae, d_in])."""
    if name not in weights:
        raise UserError(f"{where}: missing {name}")
    shape = weights[name].shape
    if len(shape) != 2 or 0 in shape:
        axes = "[d_sae, d_in]" if transposed else "[d_in, d_sae]"
        raise UserError(f"{where}: {name} must have two dimensions {axes}, got {shape}")
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def choice(where: pathlib.Path, config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """Returns `config[key]`, one of `allowed` and of its type (1 is not True)."""
    value = config.get(key, default)
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise UserError(f"{where}: {key} must be {' or '.join(json.dumps(a) for a in allowed)}, got {value!r}")
    return value


def text(where: pathlib.Path, config: Mapping[str, Any], key: str) -> str:
    """Returns the string `config[key]`."""
    value = config.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string, got {value!r}")
    return value


def integer(where: pathlib.Path, config: Mapping[str, Any], key: str) -> int:
    """Returns the integer `config[key]`."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**53:
        raise UserError(f"{where}: {key} must be an integer, below 2^53, got {value!r}")
    return value


def number(where: pathlib.Path, config: Mapping[str, Any], key: str) -> float:
    """Returns the finite number `config[key]`."""
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e100:
        raise UserError(f"{where}: {key} must be a finite number, got {value!r}")
    return float(value)


def build(where: pathlib.Path, name: str, params: base.SAEParams, **fields: Any) -> base.Sparsifier:
    """Returns the architecture `name` of loaded parameters: their sizes, and a unit decoder if they have one.

    Numbers that are finite in the file may not be once scales and norms are folded; they are refused here.
    """
    folded = {"W_enc": params.W_enc, "b_enc": params.b_enc, "W_dec": params.W_dec, "b_dec": params.b_dec}
    for key, array in (folded | params.extra).items():
        if not np.isfinite(np.asarray(array)).all():
            raise UserError(
                f"{where}: {key} must be finite in float32 in the scale of the data, {_bad(np.asarray(array))}"
            )
    d_in, d_sae = params.W_enc.shape
    shared = {"d_in": d_in, "d_sae": d_sae, "unit_decoder": unit_rows(params.W_dec), "decoder_init_norm": 1.0}
    try:
        return base.ARCHITECTURES[name](**shared | fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def transcoder(params: base.SAEParams) -> dict[str, Any]:
    """Returns the fields of a transcoder from one hook to another, as its weights (W_skip among `extra`) say them."""
    sites = (params.W_enc.shape[0], params.W_dec.shape[1])
    return {"family": Family.transcoder, "sites": sites, "skip": "W_skip" in params.extra, "subtract_b_dec": False}


def unit_rows(W_dec: Any) -> bool:
    """Returns whether all decoder rows have norm 1."""
    return bool(np.all(np.abs(np.linalg.norm(np.asarray(W_dec, np.float64), axis=1) - 1) < 1e-5))


def own_k(sparsifier: base.Sparsifier) -> int:
    """Returns `k` of an architecture that has one."""
    return int(getattr(sparsifier, "k"))  # noqa: B009


def check_linear(
    sparsifier: base.Sparsifier, format: str, known: Iterable[str], families: Collection[Family] = (Family.sae,)
) -> None:
    """Refuses an SAE whose family, architecture or encoder a format lacks."""
    if sparsifier.family not in families:
        names = ", ".join(family.name for family in families)
        raise UserError(f"sae.family={sparsifier.family.name}: the {format} format takes {names}")
    if sparsifier.family is Family.transcoder and len(sparsifier.sites) > 2:
        raise UserError(f"sae.sites={sparsifier.sites}: the {format} format takes transcoders of one hook to one hook")
    if sparsifier.name not in known:
        of_family = "" if sparsifier.family is Family.sae else f" for family={sparsifier.family.name}"
        raise UserError(f"sae.type={sparsifier.name}: the {format} format takes {', '.join(known)}{of_family}")
    if sparsifier.encoder not in (EncoderKind.linear, EncoderKind.tied):
        raise UserError(f"sae.encoder={sparsifier.encoder.name}: the {format} format takes linear and tied")


def with_thresholds(sparsifier: base.Sparsifier, params: base.SAEParams) -> base.SAEParams:
    """Returns parameters with one threshold for each latent, of an architecture with one threshold for all."""
    threshold = np.asarray(params.extra["threshold"])
    if threshold.ndim == 0 and not threshold > 0:
        raise UserError(f"sae.type={sparsifier.name}: has no threshold yet; it needs at least one training step")
    full = jnp.asarray(np.broadcast_to(np.maximum(threshold, 0), (sparsifier.d_sae,)), jnp.float32)
    return dataclasses.replace(params, extra=params.extra | {"threshold": full})


def params(W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any, **extra: Any) -> base.SAEParams:
    """Returns float32 parameters of JAX from arrays of numpy."""
    W_enc, b_enc, W_dec, b_dec = (jnp.asarray(a, jnp.float32) for a in (W_enc, b_enc, W_dec, b_dec))
    of_architecture = {name: jnp.asarray(array, jnp.float32) for name, array in extra.items()}
    return base.SAEParams(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, extra=of_architecture)


def shifted(params: base.SAEParams, sign: float) -> base.SAEParams:
    """Moves b_dec on the input into b_enc: (x - b_dec) W + b = x W + (b - b_dec W) for -1, and back for +1."""
    shift = np.asarray(params.b_dec, np.float32) @ np.asarray(params.W_enc, np.float32)
    return dataclasses.replace(params, b_enc=jnp.asarray(np.asarray(params.b_enc) + np.float32(sign) * shift))


def _bad(array: np.ndarray) -> str:
    return f"{int(np.isnan(array).sum())} NaN and {int(np.isinf(array).sum())} infinite values"
