"""Weight loading: fills a model's parameters leaf by leaf and shard by shard, straight onto the mesh.

A file format provides a `TensorSource`: tensors under their Hugging Face names (`hf.py` reads safetensors,
`gguf_file.py` dequantises). The tables here say which tensors make up each leaf and how a leaf is sharded. No host
ever holds more than one leaf's local shards.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax.activations.language_model.config import ModelConfig
from saejax.activations.language_model.model import Decoder
from saejax.errors import UserError
from saejax.parallel.sharding import LATENT


class TensorSource(Protocol):
    """Named tensors in files. Names are without the leading `model.` or `transformer.`."""

    name: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the files with its shape."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor, floating point, any precision."""
        ...


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Source of one leaf in the files."""

    name: str
    """Tensor name; `{}` is the layer for leaves of blocks."""
    transposed: bool = False
    """The file holds [out, in]; a leaf is [in, out]."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the leaf is the i-th of n equal parts of the last axis (GPT-2's fused projection)."""


_ROTARY = {
    "W_E": Tensor("embed_tokens.weight"),
    "W_U": Tensor("lm_head.weight", transposed=True),
    "final_norm.gain": Tensor("norm.weight"),
    "blocks.attn_norm.gain": Tensor("layers.{}.input_layernorm.weight"),
    "blocks.mlp_norm.gain": Tensor("layers.{}.post_attention_layernorm.weight"),
    "blocks.attn.q_norm.gain": Tensor("layers.{}.self_attn.q_norm.weight"),
    "blocks.attn.k_norm.gain": Tensor("layers.{}.self_attn.k_norm.weight"),
    **{f"blocks.attn.W_{x.upper()}": Tensor(f"layers.{{}}.self_attn.{x}_proj.weight", True) for x in "qkvo"},
    **{f"blocks.attn.b_{x.upper()}": Tensor(f"layers.{{}}.self_attn.{x}_proj.bias") for x in "qkvo"},
    **{f"blocks.mlp.W_{our}": Tensor(f"layers.{{}}.mlp.{hf}_proj.weight", True)
       for our, hf in (("gate", "gate"), ("in", "up"), ("out", "down"))},
    **{f"blocks.mlp.b_{our}": Tensor(f"layers.{{}}.mlp.{hf}_proj.bias")
       for our, hf in (("gate", "gate"), ("in", "up"), ("out", "down"))},
}  # fmt: skip
_GEMMA = {
    **_ROTARY,
    "blocks.attn_post_norm.gain": Tensor("layers.{}.post_attention_layernorm.weight"),
    "blocks.mlp_norm.gain": Tensor("layers.{}.pre_feedforward_layernorm.weight"),
    "blocks.mlp_post_norm.gain": Tensor("layers.{}.post_feedforward_layernorm.weight"),
}
_GPT2 = {
    "W_E": Tensor("wte.weight"),
    "W_pos": Tensor("wpe.weight"),
    "W_U": Tensor("lm_head.weight", transposed=True),
    "final_norm.gain": Tensor("ln_f.weight"),
    "final_norm.bias": Tensor("ln_f.bias"),
    "blocks.attn_norm.gain": Tensor("h.{}.ln_1.weight"),
    "blocks.attn_norm.bias": Tensor("h.{}.ln_1.bias"),
    "blocks.mlp_norm.gain": Tensor("h.{}.ln_2.weight"),
    "blocks.mlp_norm.bias": Tensor("h.{}.ln_2.bias"),
    **{f"blocks.attn.W_{x}": Tensor("h.{}.attn.c_attn.weight", part=(i, 3)) for i, x in enumerate("QKV")},
    **{f"blocks.attn.b_{x}": Tensor("h.{}.attn.c_attn.bias", part=(i, 3)) for i, x in enumerate("QKV")},
    "blocks.attn.W_O": Tensor("h.{}.attn.c_proj.weight"),
    "blocks.attn.b_O": Tensor("h.{}.attn.c_proj.bias"),
    "blocks.mlp.W_in": Tensor("h.{}.mlp.c_fc.weight"),
    "blocks.mlp.b_in": Tensor("h.{}.mlp.c_fc.bias"),
    "blocks.mlp.W_out": Tensor("h.{}.mlp.c_proj.weight"),
    "blocks.mlp.b_out": Tensor("h.{}.mlp.c_proj.bias"),
}
# Tensor parallelism over `latent`: by the leaf's last name, the axis counted from the end.
_SHARDED_AXIS = {
    "W_E": 2, "W_U": 1, "W_Q": 1, "W_K": 1, "W_V": 1, "W_O": 2, "b_Q": 1, "b_K": 1, "b_V": 1,
    "W_gate": 1, "W_in": 1, "W_out": 2, "b_gate": 1, "b_in": 1,
}  # fmt: skip


@functools.lru_cache(maxsize=16)
def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its parameters as shapes, without memory."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config)))


def load(config: ModelConfig, source: TensorSource, *, mesh: Mesh, dtype: jnp.dtype) -> nnx.State:
    """All parameters of a model, each on its devices.

    Args:
      config: of the model in the files.
      source: the files.
      mesh: where to.
      dtype: of the matrices. Norm gains and biases stay float32.

    Returns:
      The state that `nnx.merge` takes with `abstract(config)[0]`.

    Raises:
      UserError: a tensor is missing, unknown, or has another shape than the configuration says.
    """
    table = check(config, source)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(config)[1])
    names = [_leaf_name(path) for path, _ in leaves]
    arrays = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        fetch = _Leaf(source, table[name], leaf.shape, "norm" in name and config.post_norms)
        kept = jnp.float32 if "norm" in name else dtype
        sharding = leaf_sharding(config, name, leaf.shape, mesh)
        arrays.append(jax.make_array_from_callback(leaf.shape, sharding, lambda i, f=fetch, t=kept: f(i).astype(t)))
    return jax.tree_util.tree_unflatten(structure, arrays)


def leaf_sharding(config: ModelConfig, name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Whole heads, MLP units or vocabulary rows over `latent` if they divide; else replicated."""
    last, n = name.split(".")[-1], mesh.shape.get(LATENT, 1)
    units = {"W_Q": config.n_heads, "b_Q": config.n_heads, "W_O": config.n_heads}
    units |= dict.fromkeys(("W_K", "W_V", "b_K", "b_V"), config.n_kv_heads)
    if last not in _SHARDED_AXIS:
        return NamedSharding(mesh, P())
    axis = len(shape) - _SHARDED_AXIS[last]
    if n == 1 or units.get(last, shape[axis]) % n:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*(LATENT if i == axis else None for i in range(len(shape)))))


class _Leaf:
    """Reads any part of one leaf; replicas on several devices read the files once."""

    def __init__(self, source: TensorSource, tensor: Tensor, shape: tuple[int, ...], offset: bool) -> None:
        self.source, self.tensor, self.shape, self.offset = source, tensor, shape, offset
        self._read: dict[tuple, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or tuple(slice(None) for _ in self.shape)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        if bounds not in self._read:
            self._read[bounds] = self._gather(bounds)
        return self._read[bounds]

    def _gather(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        if "{}" not in self.tensor.name:
            return self._one(self.tensor.name, bounds)
        layers = range(*bounds[0])
        return np.stack([self._one(self.tensor.name.format(layer), bounds[1:]) for layer in layers])

    def _one(self, name: str, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        shift = self.tensor.part[0] * self.shape[-1]
        index = (*(slice(*b) for b in bounds[:-1]), slice(bounds[-1][0] + shift, bounds[-1][1] + shift))
        found = self.source.read(name, index[::-1] if self.tensor.transposed else index)
        found = found.T if self.tensor.transposed else found
        # Gemma's files hold gain - 1, to be added in float32.
        return found.astype(np.float32) + 1 if self.offset else found


def _leaf_name(path: tuple[Any, ...]) -> str:
    """`blocks.attn.W_Q` from a tree path; entries that only unwrap a variable are left out."""
    parts = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return ".".join(str(part) for part in parts if part not in (None, "value", "raw_value"))


def check(config: ModelConfig, source: TensorSource) -> dict[str, Tensor]:
    """Compares the names and shapes in the files with those that the configuration asks for; reads next to nothing.

    Args:
      config: of the model in the files.
      source: the files.

    Returns:
      Where each leaf of the model stands in them.

    Raises:
      UserError: a tensor is missing, unknown, or has another shape than the configuration says.
    """
    found = source.shapes()
    table = {"gpt2": _GPT2}.get(config.family, _GEMMA if config.post_norms else _ROTARY)
    # Each layer has a tensor: with more layers than tensors, one is missing among the first of them.
    wanted = _expected(config, min(config.n_layers, len(found) + 1))
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    tied = config.tied_head and "lm_head.weight" in unknown
    if tied:
        unknown.remove("lm_head.weight")
    if missing:
        raise UserError(f"{source.name}: weight {missing[0]!r} is missing ({len(missing)} in all) for {config.family}")
    if unknown:
        raise UserError(f"{source.name}: weight {unknown[0]!r} is unknown ({len(unknown)} in all) to {config.family}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(f"{source.name}: weight {name!r} has shape {found[name]}, allowed: {shape}")
    if tied:
        _check_tied(source, table["W_E"].name, found)
    return table


def _expected(config: ModelConfig, n_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model's files must hold, with its shape.

    Args:
      config: of the model.
      n_layers: layers to list; None lists all.
    """
    table = {"gpt2": _GPT2}.get(config.family, _GEMMA if config.post_norms else _ROTARY)
    listed = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract(config)[1])[0]:
        tensor = table[_leaf_name(path)]
        per_layer = "{}" in tensor.name
        own = leaf.shape[1:] if per_layer else leaf.shape
        whole = (*own[:-1], own[-1] * tensor.part[1])
        for layer in range((config.n_layers if n_layers is None else n_layers) if per_layer else 1):
            listed[tensor.name.format(layer)] = whole[::-1] if tensor.transposed else whole
    return listed


def _check_tied(source: TensorSource, embedding: str, found: dict[str, tuple[int, ...]]) -> None:
    """A head written although the configuration ties it must be the embedding; a sample of rows tells."""
    rows = (slice(0, 64), slice(None))
    same = found["lm_head.weight"] == found[embedding]
    if not same or not np.array_equal(source.read("lm_head.weight", rows), source.read(embedding, rows)):
        raise UserError(f"{source.name}: tie_word_embeddings=true, but lm_head.weight differs from {embedding}")
