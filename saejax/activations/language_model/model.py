"""Forward pass of every supported family: `flax.nnx` modules over a stack of equal blocks.

The blocks are one module whose parameters have a leading layer axis. A run over layers [first, last) is a `lax.scan`:
compile time does not grow with depth, and nothing outside the range is computed. `weights.py` provides the weights;
`backend.py` compiles the code here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from saejax.activations.language_model import hooks
from saejax.activations.language_model.config import ModelConfig

Touch = Callable[[str, jax.Array], jax.Array]
"""Called by a block at each of its sites with (site, value); what it returns goes on."""

_QUERY_CHUNK = 1024  # longer sequences attend in pieces, so that scores take [b, heads, 1024, s], not [b, heads, s, s]
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Context:
    """Values that all layers of one forward pass share. Registered as a pytree below."""

    segments: jax.Array
    """[b, s] int32, 0 = padding."""
    positions: jax.Array
    """[b, s] int32, from 0 in every segment."""
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    """Cosine and sine [b, s, d_head / 2] of the full layers and, where they differ, the window layers."""


jax.tree_util.register_dataclass(Context, ["segments", "positions", "tables"], [])


def segment_positions(segments: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Distance of each token from the first token of its segment.

    Args:
      segments: equal numbers side by side are one segment.

    Returns:
      int32 [b, s].

    Examples:
      >>> segment_positions(jnp.asarray([[1, 1, 2, 2, 2, 0]])).tolist()
      [[0, 1, 0, 1, 2, 0]]
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


class Norm(nnx.Module):
    """RMS norm or layer norm over the last axis, computed in float32."""

    def __init__(self, config: ModelConfig, *shape: int, rms: bool = False) -> None:
        self.eps = config.norm_eps
        self.gain = _zeros(*shape)
        self.bias = _zeros(*shape) if config.norm == "layer" and not rms else None

    def __call__(
        self, x: Float[Array, "*n d"], touch: Callable[[jax.Array], jax.Array] = lambda normed: normed
    ) -> Float[Array, "*n d"]:
        """Calls `touch` where `hooks.py` defines it: before the gain of an RMS norm, after a layer norm's bias."""
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        gain = _over_last(self.gain[...], wide)
        if self.bias is None:
            return (touch(wide) * gain).astype(x.dtype)
        return touch(wide * gain + _over_last(self.bias[...], wide)).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention inside segments, with grouped key and value heads."""

    def __init__(self, config: ModelConfig) -> None:
        layers, d_model = config.n_layers, config.d_model
        q_width, kv_width = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.config = config
        self.W_Q, self.W_K = _zeros(layers, d_model, q_width), _zeros(layers, d_model, kv_width)
        self.W_V, self.W_O = _zeros(layers, d_model, kv_width), _zeros(layers, q_width, d_model)
        biased = config.qkv_bias
        self.b_Q = _zeros(layers, q_width) if biased else None
        self.b_K = _zeros(layers, kv_width) if biased else None
        self.b_V = _zeros(layers, kv_width) if biased else None
        self.b_O = _zeros(layers, d_model) if config.out_bias else None
        self.q_norm = Norm(config, layers, config.d_head, rms=True) if config.qk_norm else None
        self.k_norm = Norm(config, layers, config.d_head, rms=True) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "b s d"], context: Context, window: Int[Array, ""], touch: Touch
    ) -> Float[Array, "b s d"]:
        config, (b, s, _) = self.config, x.shape
        q = _linear(x, self.W_Q, self.b_Q).reshape(b, s, config.n_heads, config.d_head)
        k = _linear(x, self.W_K, self.b_K).reshape(b, s, config.n_kv_heads, config.d_head)
        v = _linear(x, self.W_V, self.b_V).reshape(b, s, config.n_kv_heads, config.d_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.tables:
            table = context.tables[0]
            if len(context.tables) == 2:
                table = jax.tree.map(lambda full, local: jnp.where(window > 0, local, full), *context.tables)
            q, k = _rotate(q, table), _rotate(k, table)
        z = _attend(config, q, k, v, context.segments, window).reshape(b, s, -1)
        return _linear(touch(hooks.Z, z), self.W_O, self.b_O)


class MLP(nnx.Module):
    """act(x W_gate) * (x W_in) W_out, or act(x W_in) W_out."""

    def __init__(self, config: ModelConfig) -> None:
        layers, d_model, d_mlp = config.n_layers, config.d_model, config.d_mlp
        self.activation = config.activation
        self.W_in, self.W_out = _zeros(layers, d_model, d_mlp), _zeros(layers, d_mlp, d_model)
        self.W_gate = _zeros(layers, d_model, d_mlp) if config.gated_mlp else None
        self.b_in = _zeros(layers, d_mlp) if config.mlp_bias else None
        self.b_out = _zeros(layers, d_model) if config.mlp_bias else None
        self.b_gate = _zeros(layers, d_mlp) if config.mlp_bias and config.gated_mlp else None

    def __call__(self, x: Float[Array, "b s d"], touch: Touch) -> Float[Array, "b s d"]:
        act, inner = _ACTIVATIONS[self.activation], _linear(x, self.W_in, self.b_in)
        post = act(inner) if self.W_gate is None else act(_linear(x, self.W_gate, self.b_gate)) * inner
        return _linear(touch(hooks.MLP_POST, post), self.W_out, self.b_out)


class Block(nnx.Module):
    """All layers of the residual stream at once; `at` picks one, which can then be called."""

    def __init__(self, config: ModelConfig) -> None:
        shape = (config.n_layers, config.d_model)
        self.attn_norm, self.mlp_norm = Norm(config, *shape), Norm(config, *shape)
        self.attn_post_norm = Norm(config, *shape) if config.post_norms else None
        self.mlp_post_norm = Norm(config, *shape) if config.post_norms else None
        self.attn, self.mlp = Attention(config), MLP(config)

    def at(self, layer: Int[Array, ""]) -> Block:
        """The block of one layer: the same module without the layer axis."""
        graph, state = nnx.split(self)
        pick = lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False)  # noqa: E731
        return nnx.merge(graph, jax.tree.map(pick, state))

    def __call__(
        self, h: Float[Array, "b s d"], context: Context, window: Int[Array, ""], touch: Touch
    ) -> Float[Array, "b s d"]:
        h = touch(hooks.RESID_PRE, h)
        branch = self.attn(self.attn_norm(h, functools.partial(touch, hooks.LN1)), context, window, touch)
        if self.attn_post_norm is not None:
            branch = self.attn_post_norm(branch)
        h = touch(hooks.RESID_MID, h + touch(hooks.ATTN_OUT, branch))
        branch = self.mlp(self.mlp_norm(h, functools.partial(touch, hooks.LN2)), touch)
        if self.mlp_post_norm is not None:
            branch = self.mlp_post_norm(branch)
        return touch(hooks.RESID_POST, h + touch(hooks.MLP_OUT, branch))


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and head; parameters are zeros until `weights.load` fills them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.W_E = _zeros(config.vocab_size, config.d_model)
        self.W_pos = _zeros(config.context_length, config.d_model) if config.rope is None else None
        self.blocks = Block(config)
        self.final_norm = Norm(config, config.d_model)
        self.W_U = None if config.tied_head else _zeros(config.d_model, config.vocab_size)

    def context(self, segments: Int[Array, "b s"]) -> Context:
        """Positions and rotation tables of a batch, shared by all layers."""
        config, positions = self.config, segment_positions(segments)
        ropes = [rope for rope in (config.rope, config.rope_local) if rope is not None]
        angles = [positions[:, :, None] * rope.frequencies(config.d_head)[None, None, :] for rope in ropes]
        return Context(segments, positions, tuple((jnp.cos(angle), jnp.sin(angle)) for angle in angles))

    def embed(self, tokens: Int[Array, "b s"], context: Context) -> Float[Array, "b s d"]:
        """The residual stream before block 0."""
        h = self.W_E[...][tokens]
        if self.W_pos is not None:
            h = h + self.W_pos[...][context.positions]
        return h * jnp.asarray(self.config.embed_scale, h.dtype)

    def span(
        self,
        h: Float[Array, "b s d"],
        context: Context,
        first: int,
        last: int,
        *,
        taps: tuple[hooks.Hook, ...] = (),
        put: tuple[hooks.Hook, jax.Array] | None = None,
    ) -> tuple[Float[Array, "b s d"], dict[hooks.Hook, jax.Array]]:
        """Blocks first to last - 1, reading some places and replacing at most one.

        Args:
          h: residual stream before block `first`.
          context: of the same batch.
          first: first block.
          last: one past the last block; static, as `first` is.
          taps: places to read; each must lie in the range.
          put: a place and the value [b, s, width] that it takes, instead of the computed one.

        Returns:
          The residual stream before block `last`, and the value at each tap.
        """
        config = self.config
        windows = jnp.asarray([config.window(layer) for layer in range(config.n_layers)], jnp.int32)
        layers_of = {site: sorted(tap.layer for tap in taps if tap.site == site) for site in hooks.SITES}
        layers_of = {site: layers for site, layers in layers_of.items() if layers}
        slot = {site: jnp.asarray(_slots(layers, config.n_layers)) for site, layers in layers_of.items()}

        def step(carry: tuple, layer: jax.Array) -> tuple[tuple, None]:
            h, taken = carry
            seen: dict[str, jax.Array] = {}

            def touch(site: str, value: jax.Array) -> jax.Array:
                if put is not None and site == put[0].site:
                    value = jnp.where(layer == put[0].layer, put[1].astype(value.dtype), value)
                seen[site] = value
                return value

            h = self.blocks.at(layer)(h, context, windows[layer], touch)
            taken = {site: _store(kept, seen[site], slot[site][layer]) for site, kept in taken.items()}
            return (h, taken), None

        room = {
            site: jnp.zeros((len(layers), *h.shape[:2], hooks.width(hooks.Hook(0, site), config)), h.dtype)
            for site, layers in layers_of.items()
        }
        (h, taken), _ = lax.scan(step, (h, room), jnp.arange(first, last))
        return h, {tap: taken[tap.site][layers_of[tap.site].index(tap.layer)] for tap in taps}

    def logits(self, h: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """float32 logits from the residual stream after the last block."""
        normed = self.final_norm(h)
        head, dims = (self.W_E, "bsd,vd->bsv") if self.W_U is None else (self.W_U, "bsd,dv->bsv")
        out = jnp.einsum(dims, normed, head[...], preferred_element_type=jnp.float32)
        return _softcap(out, self.config.logit_softcap)


def _zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def _over_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector the rank of x, explicitly."""
    return lax.expand_dims(vector, range(x.ndim - vector.ndim))


def _linear(x: Float[Array, "b s d"], weight: nnx.Param, bias: nnx.Param | None) -> Float[Array, "b s e"]:
    out = x @ weight[...]
    return out if bias is None else out + _over_last(bias[...], out)


def _softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _rotate(x: Float[Array, "b s h d"], table: tuple[jax.Array, jax.Array]) -> Float[Array, "b s h d"]:
    """Turn coordinate pairs (i, i + d/2) of every head by the angle of its position."""
    cos, sin = (part[:, :, None, :] for part in table)
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x.dtype)


def _attend(
    config: ModelConfig,
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    segments: Int[Array, "b s"],
    window: Int[Array, ""],
) -> Float[Array, "b s h d"]:
    """Softmax attention; h / g query heads share each key and value head."""
    b, s, n_heads, d_head = q.shape
    groups = k.shape[2]
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    index = jnp.arange(s)

    def rows(q: jax.Array, q_segments: jax.Array, q_index: jax.Array) -> jax.Array:
        # All queries that share a key head are rows of one matrix product.
        n = q.shape[1]
        by_group = q.transpose(0, 2, 1, 3).reshape(b, groups, -1, d_head)
        scores = jnp.matmul(by_group, keys, preferred_element_type=jnp.float32) * config.attn_scale
        scores = _softcap(scores, config.attn_softcap).reshape(b, groups, -1, n, s)
        seen = _visible(q_segments, segments, q_index, index, window)[:, None, None]
        scores = jnp.where(seen, scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1).reshape(b, n_heads, n, 1)
        mixed = jnp.matmul(weights.astype(v.dtype).reshape(b, groups, -1, s), values)
        # Divided after the product: d_head numbers a row instead of s.
        out = mixed.reshape(b, n_heads, n, d_head) / total.astype(v.dtype)
        return out.transpose(0, 2, 1, 3)

    if s <= _QUERY_CHUNK or s % _QUERY_CHUNK:
        return rows(q, segments, index)
    chunks = s // _QUERY_CHUNK
    split = lambda x: jnp.moveaxis(x.reshape(b, chunks, _QUERY_CHUNK, *x.shape[2:]), 1, 0)  # noqa: E731
    out = lax.map(lambda part: rows(*part), (split(q), split(segments), index.reshape(chunks, _QUERY_CHUNK)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _visible(
    q_segments: Int[Array, "b q"],
    k_segments: Int[Array, "b k"],
    q_index: Int[Array, " q"],
    k_index: Int[Array, " k"],
    window: Int[Array, ""],
) -> Bool[Array, "b q k"]:
    """Keys of the same segment, not after the query, and inside the layer's window (0: no window)."""
    distance = q_index[:, None] - k_index[None, :]
    near = (distance >= 0) & ((distance < window) | (window == 0))
    return near[None] & (q_segments[:, :, None] == k_segments[:, None, :])


def _slots(layers: list[int], n_layers: int) -> np.ndarray:
    """Slot of each layer's value among the tapped layers; -1 for layers that are not tapped."""
    slots = np.full(n_layers, -1, np.int32)
    slots[layers] = np.arange(len(layers))
    return slots


def _store(kept: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    """Write value at kept[slot], or nothing for slot -1, in place under scan."""
    at = jnp.maximum(slot, 0)
    old = lax.dynamic_index_in_dim(kept, at, keepdims=False)
    return lax.dynamic_update_index_in_dim(kept, jnp.where(slot >= 0, value.astype(old.dtype), old), at, 0)
