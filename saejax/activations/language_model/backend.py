"""Interface of a language model for harvesting and evaluation, and its JAX implementation.

`LMBackend` is the contract; `torch_source.py` implements its `capture` for models without a JAX form. `LanguageModel`
compiles the forward pass of `model.py`. It runs only the layers below the highest hook and returns activations sharded
over `data`. It pads a batch that does not divide over the mesh, and cuts the result.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saejax.activations.language_model import hooks as hooks_
from saejax.activations.language_model import weights
from saejax.activations.language_model.config import ModelConfig
from saejax.activations.language_model.file_tokenizer import FileTokenizer
from saejax.activations.language_model.model import Decoder
from saejax.errors import UserError
from saejax.parallel.sharding import DATA

Tokens = Int[Array, "b s"] | Int[np.ndarray, "b s"]


class LMBackend(Protocol):
    """A language model whose activations can be read and replaced."""

    config: ModelConfig
    provenance: dict[str, Any]
    tokenizer: tokenizers.Tokenizer | None

    def hook_width(self, hook: str) -> int:
        """Coordinates of the activation at a hook."""
        ...

    def capture(self, tokens: Tokens, segments: Tokens, hooks: tuple[str, ...]) -> dict[str, jax.Array]:
        """Activations [b, s, width] at each hook; only the layers needed are run."""
        ...

    def lower(self, tokens: Tokens, segments: Tokens, hook: str) -> jax.Array:
        """The activation [b, s, width] at one hook."""
        ...

    def upper(self, h: jax.Array, tokens: Tokens, segments: Tokens, hook: str) -> jax.Array:
        """Logits [b, s, vocab] of the model in which the activation at the hook is h."""
        ...


class LanguageModel:
    """A decoder-only transformer in JAX, weights on their devices. Made by `loading.load`.

    Segments are int32 [b, s]: 0 is padding, equal numbers side by side are one document. Attention never
    leaves a segment and positions restart in each. What comes back at padding is finite and means nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: nnx.State,
        *,
        tokenizer: FileTokenizer | None,
        provenance: dict[str, Any],
        mesh: Mesh,
    ) -> None:
        self.config, self.state, self.mesh = config, state, mesh
        self.file_tokenizer, self.provenance = tokenizer, provenance
        self.tokenizer: tokenizers.Tokenizer | None = tokenizer and tokenizer.tokenizer

    @property
    def dtype(self) -> jnp.dtype:
        """Of the matrices and of every activation; logits are float32."""
        return _decoder(self.config, self.state).W_E[...].dtype

    def hook_width(self, hook: str) -> int:
        """Coordinates of the activation at a hook.

        Args:
          hook: for example `blocks.15.hook_resid_post`.

        Returns:
          d_model; n_heads * d_head at `attn.hook_z`; d_mlp at `mlp.hook_post`.

        Raises:
          UserError: the model has no such hook.
        """
        return hooks_.width(hooks_.parse(hook, self.config), self.config)

    def capture(self, tokens: Tokens, segments: Tokens, hooks: tuple[str, ...]) -> dict[str, Float[Array, "b s _"]]:
        """Activations at some hooks; no layer above the highest one is run.

        Args:
          tokens: int [b, s].
          segments: int [b, s].
          hooks: names; each is compiled once with the others and the shape.

        Returns:
          Hook name -> activation [b, s, width] in the model's dtype.

        Raises:
          UserError: an unknown hook, a token outside the vocabulary, or more tokens than the context length.
        """
        parsed = tuple(hooks_.parse(hook, self.config) for hook in hooks)
        if not parsed:
            return {}
        placed = self._place(tokens, segments)
        with self._on_own_mesh():
            values = _capture(self.state, *placed, config=self.config, mesh=self.mesh, hooks=parsed)
        return {hook: _cut(value, len(tokens)) for hook, value in zip(hooks, values, strict=True)}

    def lower(self, tokens: Tokens, segments: Tokens, hook: str) -> Float[Array, "b s width"]:
        """The activation at one hook: the first half of a splice. See `capture`."""
        return self.capture(tokens, segments, (hook,))[hook]

    def upper(
        self, h: Float[Array, "b s width"], tokens: Tokens, segments: Tokens, hook: str
    ) -> Float[Array, "b s vocab"]:
        """Logits of the model in which the activation at a hook is replaced: the second half of a splice.

        Args:
          h: the new activation. `upper(lower(tokens, ...), tokens, ...)` equals `logits(tokens, ...)`.
          tokens: int [b, s]; needed where the hook lies in a branch: its residual stream is recomputed.
          segments: int [b, s].
          hook: the place.

        Returns:
          float32 logits.

        Raises:
          UserError: as `capture`, or h has another shape than the hook.
        """
        parsed = hooks_.parse(hook, self.config)
        wanted = (*tokens.shape, hooks_.width(parsed, self.config))
        if h.shape != wanted:
            raise UserError(f"activation at {hook} has shape {h.shape}, allowed: {wanted}")
        placed = self._place(tokens, segments)
        value = self._padded(h)
        with self._on_own_mesh():
            out = _upper(self.state, *placed, value, config=self.config, mesh=self.mesh, hook=parsed)
        return _cut(out, len(tokens))

    def logits(self, tokens: Tokens, segments: Tokens) -> Float[Array, "b s vocab"]:
        """float32 logits of the unchanged model; logits[:, t] predict token t + 1."""
        placed = self._place(tokens, segments)
        with self._on_own_mesh():
            out = _logits(self.state, *placed, config=self.config, mesh=self.mesh)
        return _cut(out, len(tokens))

    def unembedding(self) -> Float[Array, "d_model vocab"]:
        """Direction of each token's logit in the final residual stream: diag(final norm gain) W_U, float32.

        A direction's products with it are its direct effects on the logits, up to the norm's scale.
        """
        decoder = _decoder(self.config, self.state)
        head = decoder.W_E[...].T if decoder.W_U is None else decoder.W_U[...]
        return head.astype(jnp.float32) * decoder.final_norm.gain[...][:, None]

    def _place(self, tokens: Tokens, segments: Tokens) -> tuple[jax.Array, jax.Array]:
        """Checked tokens and segments on the devices."""
        host, host_segments = np.asarray(tokens), np.asarray(segments)
        if host.ndim != 2 or host.shape != host_segments.shape:
            raise UserError(f"tokens {host.shape} and segments {host_segments.shape} must have one shape [b, s]")
        if host.size and not 0 <= host.min() <= host.max() < self.config.vocab_size:
            wrong = host.min() if host.min() < 0 else host.max()
            raise UserError(f"token {wrong} is outside the vocabulary, allowed: 0 to {self.config.vocab_size - 1}")
        if host.shape[1] > self.config.context_length:
            raise UserError(f"{host.shape[1]} tokens exceed the model's context, allowed: {self.config.context_length}")
        return self._padded(host.astype(np.int32)), self._padded(host_segments.astype(np.int32))

    def _on_own_mesh(self) -> contextlib.AbstractContextManager:
        """The model may live on fewer devices than the training or evaluation that surrounds it."""
        surrounded = not jax.sharding.get_abstract_mesh().empty
        return jax.set_mesh(self.mesh) if surrounded else contextlib.nullcontext()

    def _padded(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Rows of zeros up to a multiple of the mesh's data axis, sharded over it."""
        short = -len(x) % self.mesh.shape.get(DATA, 1)
        if short:
            x = jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1)))
        return jax.device_put(x, _over_data(self.mesh))


def _cut(x: jax.Array, rows: int) -> jax.Array:
    """Without the rows of `_padded`; untouched, and so without a copy, where there are none."""
    return x if len(x) == rows else x[:rows]


def _over_data(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(DATA if DATA in mesh.shape else None))


def _pinned(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Keep a result where its rows are, so that the trainer's data axis finds them in place."""
    return jax.lax.with_sharding_constraint(x, _over_data(mesh))


def _decoder(config: ModelConfig, state: nnx.State) -> Decoder:
    return nnx.merge(weights.abstract(config)[0], state)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "hooks"))
def _capture(
    state: nnx.State,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    hooks: tuple[hooks_.Hook, ...],
) -> tuple[jax.Array, ...]:
    decoder = _decoder(config, state)
    context = decoder.context(segments)
    h = decoder.embed(tokens, context)
    # A block's input is the block below's output: reading it there saves a layer.
    taps = {hook: hook for hook in hooks}
    taps |= {h_: hooks_.Hook(h_.layer - 1, hooks_.RESID_POST) for h_ in hooks if h_.site == hooks_.RESID_PRE}
    inside = tuple(dict.fromkeys(tap for tap in taps.values() if tap.layer >= 0))
    taken = {hooks_.Hook(-1, hooks_.RESID_POST): h}
    if inside:
        taken |= decoder.span(h, context, 0, max(tap.n_layers for tap in inside), taps=inside)[1]
    return tuple(_pinned(taken[taps[hook]], mesh) for hook in hooks)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "hook"))
def _upper(
    state: nnx.State,
    tokens: jax.Array,
    segments: jax.Array,
    value: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    hook: hooks_.Hook,
) -> jax.Array:
    decoder = _decoder(config, state)
    context = decoder.context(segments)
    h, first, put = value.astype(decoder.W_E[...].dtype), hook.n_layers, None
    if hook.site == hooks_.RESID_MID:  # the attention below it is computed on nonsense and replaced
        first, put = hook.layer, (hook, value)
    elif hook.site not in (hooks_.RESID_PRE, hooks_.RESID_POST):
        h, first, put = decoder.embed(tokens, context), 0, (hook, value)
    h, _ = decoder.span(h, context, first, config.n_layers, put=put)
    return _pinned(decoder.logits(h), mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _logits(state: nnx.State, tokens: jax.Array, segments: jax.Array, *, config: ModelConfig, mesh: Mesh) -> jax.Array:
    decoder = _decoder(config, state)
    context = decoder.context(segments)
    h, _ = decoder.span(decoder.embed(tokens, context), context, 0, config.n_layers)
    return _pinned(decoder.logits(h), mesh)
