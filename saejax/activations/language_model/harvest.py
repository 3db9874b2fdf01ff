"""Harvest: text and a language model to two activation stores, `<path>/train` and `<path>/heldout`.

First command of the data path: `text` -> `packing` -> `language_model` -> `sinks` -> `store`. The device computes one
batch while the host writes the batch before. A shard's content depends only on the settings. So the same command
continues a stopped harvest, and several processes share one harvest by taking turns in shards.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, Shaped

from saejax.activations import disk_space, language_model, packing, store, text
from saejax.activations.language_model import special_tokens, torch_source
from saejax.activations.language_model.harvest_config import TORCH_PREFIX, HarvestConfig, OnNonfinite
from saejax.activations.sinks import Sink, calibrate, keep_mask
from saejax.activations.store import files as store_format
from saejax.activations.store import writer as store_writer
from saejax.errors import UserError
from saejax.parallel import sharding, signals

__all__ = ["HarvestConfig", "Sink", "harvest", "keep_mask"]

logger = logging.getLogger(__name__)


def harvest(config: HarvestConfig, backend: language_model.LMBackend | None = None) -> dict[str, pathlib.Path]:
    """Harvests the activations of a language model on a text; continues a harvest, or finds it complete.

    Args:
      config: what to read, run and write.
      backend: the model, if it is loaded already; otherwise `config.model` is loaded.

    Returns:
      The directories of the stores by split: "train", "heldout". Where several processes share the
      harvest, the stores are complete when the last of them returns.

    Raises:
      UserError: a setting is invalid, a split has no text, a store was begun with other settings, the dtype would
        overflow, or the disk is full.
      KeyboardInterrupt: on Ctrl-C; `errors.Stopped`, which is one, on `signals.SIGNALS`. Published shards stay; the
        same call continues.
    """
    paths = {split: pathlib.Path(config.path) / split for split in text.SPLITS}
    begun = {path: manifest for path in paths.values() if (manifest := _begun(path))}
    records = [manifest.get("text") or {} for manifest in begun.values()]
    config = dataclasses.replace(config, text=config.text.as_begun(records))
    common = {"harvest": config.settings(), "text": config.text.record()}
    for manifest in begun.values():
        store_writer.check_same(common, manifest, pathlib.Path(config.path))
    if len(begun) == len(paths) and all(_finished(path, manifest) for path, manifest in begun.items()):
        logger.info("%s is complete: nothing to do", config.path)
        return paths
    place = config.place()  # before the model, for it says which devices are this process's
    config.text.count(whole=False)  # no text, no store
    with contextlib.ExitStack() as held:
        held.enter_context(signals.watch())
        signals.share(None)  # no process of a harvest waits for another: each stops by itself
        for path in paths.values():  # before the model, which may take minutes
            held.enter_context(store_writer.admitted(path, process=place[0], n_processes=place[1]))
        if None in (config.n_tokens, config.heldout_tokens):  # all of the text will be read: its mistakes are said now
            config.text.count()
        goes_on = next((manifest for path in paths.values() if (manifest := _begun(path))), None)
        run = Run(config, place, load(config) if backend is None else backend, common, goes_on)
        surveys = {split: packing.survey(run.sequences(split)) for split in text.SPLITS}
        packing.report(surveys, config.limits())
        for split, path in paths.items():
            special_tokens.check_same_tokens(path, _begun(path), surveys[split].sha256, run.tokenizer)
        sizes = {path: run.bytes_to_write(path, surveys[split]) for split, path in paths.items()}
        disk_space.check(sizes, "lower n_tokens or choose another disk")
        for split in text.SPLITS:
            run.write(split, paths[split], surveys[split])
    return paths


def load(config: HarvestConfig) -> Any:
    """The model by its name: our own JAX form, or after `torch:` any that transformers loads."""
    if config.model.startswith(TORCH_PREFIX):
        return torch_source.load(config.model.removeprefix(TORCH_PREFIX), dtype=config.model_dtype or "float32")
    devices = jax.local_devices()
    mesh = sharding.make_mesh(*config.mesh.shape(len(devices)), devices=devices)
    return language_model.load(config.model, mesh=mesh, dtype=config.model_dtype)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that the model runs at once; rows of padding fill it up, so that all batches have one shape."""

    shard: int
    first: int
    sequences: list[packing.Sequence]
    tokens: np.ndarray
    segments: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Position of every token in its segment."""
        return packing.positions(self.segments)


class Run:
    """The model with everything derived from it and the settings: one call of `harvest`, or a live source."""

    def __init__(
        self,
        config: HarvestConfig,
        place: tuple[int, int],
        backend: language_model.LMBackend,
        common: dict,
        begun: dict | None = None,
    ):
        """Prepares a harvest.

        Args:
          config: its settings.
          place: number of this process, and how many share the work.
          backend: the model.
          common: what the manifests of both splits begin with.
          begun: the manifest of a store that goes on, whose choice of a token that begins segments stays.
        """
        if backend.tokenizer is None:
            raise UserError(f"model {config.model} has no tokenizer: text cannot be harvested with it")
        self.config, self.backend, self.tokenizer = config, backend, language_model.tokenizer_of(backend)
        sites = [{"hook": hook, "d_in": backend.hook_width(hook)} for hook in config.hooks]
        self.d_in = sum(site["d_in"] for site in sites)
        self.packer, policy = special_tokens.chosen(config, self.tokenizer, begun)
        self.dtype = store_format.numpy_dtype(config.dtype.value)
        self.process, self.n_processes = place
        self.common: dict[str, Any] = common | {
            "hook": config.hook,
            "model": backend.provenance,
            "tokenizer": self.tokenizer.identity(),
            "special_token_policy": policy,
            "dtype": config.dtype.value,
            "d_in": self.d_in,
            "context_length": config.context_length,
            "shard_sequences": config.shard_sequences,
        }
        if len(sites) > 1:
            self.common["sites"] = sites
        self.sink: Sink | None = None
        self._ahead: dict[int, list[_Measured]] = {}

    def sequences(self, split: text.Split) -> Iterator[packing.Sequence]:
        """The packed text of a split, from its beginning."""
        _, limit = self.config.limits()[split]
        documents = packing.encode_documents(self.config.text.documents(split), self.tokenizer.encode)
        return packing.until(self.packer.pack(documents), limit)

    def write(self, split: text.Split, path: pathlib.Path, survey: packing.Survey) -> None:
        """Writes this process's shards of one store."""
        facts = self.common | {
            "split": split,
            "n_sequences": survey.n_sequences,
            "n_tokens": survey.n_tokens,
            "n_shards": self._n_shards(survey),
            "tokens_sha256": survey.sha256,
            "sink": self._sink(path).to_json(),
        }
        with store.Writer(path, facts, process=self.process, n_processes=self.n_processes) as writer:
            self.sink = Sink(**writer.manifest["sink"])
            missing = writer.missing()
            try:
                if missing:
                    self._write_shards(split, writer, missing)
            except KeyboardInterrupt:
                there = len(store_format.published(path))
                logger.warning(
                    "stopped: %d of %d shards of %s are published; run the same command to continue",
                    there, facts["n_shards"], path,
                )  # fmt: skip
                raise
            self._ahead.clear()
            complete = writer.finish()
        logger.info("%s", store.describe(path) if complete else f"{path}: waiting for the other processes")

    def _write_shards(self, split: text.Split, writer: store.Writer, missing: list[int]) -> None:
        batches = self._batches(self.sequences(split), set(missing))
        results = _one_late(batches, self._dispatch)
        label = f"harvest {split}"
        with tqdm.tqdm(unit="tok", unit_scale=True, desc=label, disable=None) as progress:
            progress.total = self._tokens_in(writer.manifest, len(missing))
            # groupby asks for the next shard's first batch before a shard ends: no idle device while we sync.
            for number, group in itertools.groupby(results, key=lambda result: result[0].shard):
                with writer.shard(number) as shard:
                    for batch, measured in group:
                        shard.append(**self._content(batch, measured))
                        progress.update(sum(sequence.n_tokens for sequence in batch.sequences))

    def _batches(self, sequences: Iterator[packing.Sequence], shards: set[int]) -> Iterator[Batch]:
        """The batches of some shards, in order."""
        size, per_shard = self.config.batch_sequences, self.config.shard_sequences
        last = max(shards, default=-1)
        for first in itertools.count(0, size):
            shard = first // per_shard
            taken = list(itertools.islice(sequences, size))
            if not taken or shard > last:
                return
            if shard in shards:
                yield self._batch(taken, shard, first)

    def _batch(self, sequences: list[packing.Sequence], shard: int = 0, first: int = 0) -> Batch:
        both = np.zeros((2, self.config.batch_sequences, self.config.context_length), np.int32)
        for place, sequence in enumerate(sequences):
            both[:, place] = sequence.tokens, sequence.segments
        return Batch(shard, first, sequences, both[0], both[1])

    def start(self, sequences: list[packing.Sequence]) -> Callable[[], Shaped[np.ndarray, "n d_in"]]:
        """Starts the device on at most `batch_sequences` sequences; what comes back waits for their rows."""
        batch = self._batch(sequences)
        measured = self._measured(batch)
        return lambda: self._content(batch, measured)["rows"]

    def _dispatch(self, batch: Batch) -> "list[_Measured]":
        """Starts the device on a batch; reuses the results of the calibration."""
        if (ahead := self._ahead.pop(batch.first, None)) is not None:
            return ahead
        result = self._measured(batch)
        if self.sink is None:
            self._ahead[batch.first] = result
        return result

    def _measured(self, batch: Batch) -> "list[_Measured]":
        captured = self.backend.capture(batch.tokens, batch.segments, self.config.hooks)
        return [_measure(captured[hook], dtype=self.dtype) for hook in self.config.hooks]

    def _content(self, batch: Batch, measured: "list[_Measured]") -> dict:
        """Content of a batch for the store; waits for the device."""
        assert self.sink is not None
        n, positions, segments = len(batch.sequences), batch.positions, self._finite(batch, measured)
        keep = keep_mask(_norms(measured), positions, segments, self.sink)
        for hook, (_, _, peaks) in zip(self.config.hooks, measured, strict=True):
            if keep.any():
                store_format.check_range(float(np.asarray(peaks)[keep].max()), self.config.dtype.value, hook)
        rows = [np.asarray(values)[keep] for values, _, _ in measured]
        documents = np.zeros_like(batch.tokens)
        documents[:n] = [sequence.documents() for sequence in batch.sequences]
        numbers = np.broadcast_to(batch.first + np.arange(len(documents))[:, None], documents.shape)
        index = np.stack([batch.tokens, positions, documents, numbers], axis=-1).astype(np.int32)
        firsts = (batch.segments > 0) & (positions == 0) & self.sink.mask_position_zero
        lost = (batch.segments > 0) & (segments == 0) & ~firsts
        return {
            "rows": rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1),
            "index": index[keep],
            "tokens": np.stack([batch.tokens, batch.segments], axis=-1)[:n],
            "segment_documents": [list(sequence.segment_documents) for sequence in batch.sequences],
            "masked": {
                "position_zero": int(firsts.sum()),
                "sink": int(((batch.segments > 0) & ~keep & ~firsts & ~lost).sum()),
            }
            | ({"not_finite": int(lost.sum())} if self.config.on_nonfinite is OnNonfinite.drop else {}),
        }

    def _finite(self, batch: Batch, measured: "list[_Measured]") -> np.ndarray:
        """The segments of a batch, 0 also for tokens that are not finite where those are dropped; waits for the device.

        Raises:
          UserError: a token is not finite, and those end the harvest.
        """
        peaks = [np.asarray(peak) for *_, peak in measured]
        rest = (batch.segments > 0) & ((batch.positions > 0) | (not self.config.mask_position_zero))
        bad = rest & ~np.isfinite(peaks).all(axis=0)
        if self.config.on_nonfinite is OnNonfinite.drop or not bad.any():
            return np.where(bad, 0, batch.segments)
        place, column = np.argwhere(bad)[0]
        token, position = batch.tokens[place, column], batch.positions[place, column]
        hook = next(
            hook for hook, peak in zip(self.config.hooks, peaks, strict=True) if not np.isfinite(peak)[bad].all()
        )
        raise UserError(
            f"activations at {hook} are not finite in document {batch.sequences[place].documents()[column]} (sequence "
            f"{batch.first + place}, token {token} at position {position}): "
            "the model overflowed; model_dtype=float32 may help, on_nonfinite=drop leaves such tokens out"
        )

    def measure_sink(self) -> None:
        """Fixes the sink rule without a store; forgets the results on the way."""
        self.sink = self._sink(None)
        self._ahead.clear()

    def _sink(self, path: pathlib.Path | None) -> Sink:
        """The rule of the store if it was begun, or of the other split; otherwise measured now."""
        if path is not None and (manifest := _begun(path)):
            return Sink(**manifest["sink"])
        if self.sink is None:
            shards = set(range(self.config.sink_calibration_tokens + 1))
            results = _one_late(self._batches(self.sequences("train"), shards), self._dispatch)
            norms = ((_norms(measured), batch.positions, self._finite(batch, measured)) for batch, measured in results)
            self.sink = calibrate(self.config.sink(), norms)
            logger.info("median norm at %s: %s", self.config.hook, self.sink.median_norm)
        return self.sink

    def bytes_to_write(self, path: pathlib.Path, survey: packing.Survey) -> float:
        """About how large the shards are that a store still lacks."""
        token_bytes = 6 * store_format.INT.itemsize  # a row of the index and a pair of `tokens`
        share = 1 - len(store_format.published(path)) / self._n_shards(survey)
        return max(share, 0) * survey.n_tokens * (self.d_in * self.dtype.itemsize + token_bytes)

    def _n_shards(self, survey: packing.Survey) -> int:
        return math.ceil(survey.n_sequences / self.config.shard_sequences)

    def _tokens_in(self, manifest: dict, n_shards: int) -> int:
        share = n_shards * self.config.shard_sequences / manifest["n_sequences"]
        return int(manifest["n_tokens"] * min(share, 1))


def _begun(path: pathlib.Path) -> dict | None:
    """The manifest of a store that has shards; before the first one nothing binds."""
    return store.read_manifest(path) if store_format.published(path) else None


def _finished(path: pathlib.Path, manifest: dict) -> bool:
    """Whether a store is complete and none of its shards was lost since."""
    return manifest["complete"] and all(store.is_whole(path, n, manifest) for n in range(manifest["n_shards"]))


_Measured = tuple[jax.Array, jax.Array, jax.Array]
"""What `_measure` gives for a batch at one hook."""


@functools.partial(jax.jit, static_argnames="dtype")
def _measure(h: Float[Array, "b s d"], *, dtype: np.dtype) -> tuple[Array, Array, Array]:
    """The rows as stored, each token's norm and its largest absolute value, both float32."""
    wide = h.astype(jnp.float32)
    return h.astype(dtype), jnp.linalg.norm(wide, axis=-1), jnp.abs(wide).max(axis=-1)


def _norms(measured: list[_Measured]) -> Float[np.ndarray, "*sites_b s"]:
    """Norms [b, s] at one hook, [sites, b, s] at several; waits for the device."""
    norms = [np.asarray(norms) for _, norms, _ in measured]
    return norms[0] if len(norms) == 1 else np.stack(norms)


def _one_late(batches: Iterator[Batch], dispatch: Callable) -> Iterator[tuple[Batch, Any]]:
    """Hands out each batch with its result after the next one was dispatched, so the device never waits."""
    waiting = None
    for batch in batches:
        result = batch, dispatch(batch)
        if waiting is not None:
            yield waiting
        waiting = result
    if waiting is not None:
        yield waiting
