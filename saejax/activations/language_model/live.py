"""Live language model as a source: activations go to the training as they are computed, never to disk.

This source yields what `saejax harvest` would write: same packing, model, left-out tokens and number format. Its
held-out rows equal those of the held-out store, bit for bit. Four things differ from a store. It shuffles and deals
batches of sequences, not blocks of rows, so its batches hold other rows. Every epoch runs the model again, with other
sequences side by side, which may round differently. The number of rows of an epoch is known only at its end. The
text's tokens stay in memory, 8 bytes each, with the model's weights beside the training.

A lane runs its sequences by itself, in an order that depends on (text, n_lanes, seed), so any mesh sees the same rows.
Its position is the batch of sequences in which the next record begins. On resume it computes that batch again,
identically.
"""

import bisect
import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Shaped

from saejax.activations import language_model, packing, text
from saejax.activations.language_model import harvest, special_tokens
from saejax.activations.language_model import hooks as hooks_
from saejax.activations.language_model.harvest_config import HarvestConfig, located
from saejax.activations.loader import digest, same_stream, shuffled_blocks
from saejax.activations.source import ActivationSource, check_lanes, differences, recorded, register
from saejax.activations.store import files as store_format
from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.fields.resume_policy import Fixed, Place

logger = logging.getLogger(__name__)

_KEYS = {"path": "source.corpus", "share": "source.heldout_share"}


@functools.cache
def _of_live(corpus: type[text.TextCorpus]) -> Any:
    """A corpus whose messages name the keys of this source."""
    return type(corpus.__name__, (corpus,), {"keys": _KEYS})


def _named(corpus: str) -> type[text.TextCorpus] | None:
    """The corpus of a name; None for a path."""
    return None if corpus == text.TextFiles.name else text.TEXTS.get(corpus)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Live(ActivationSource):
    """Rows of a language model that runs beside the training; the keys are those of `saejax harvest`."""

    name: ClassVar[str] = "language_model"

    model: Place[paths.Named] = "smollm2"
    """The language model: a Hugging Face directory, a `.gguf` file, "smollm2", or "torch:" and a directory."""
    model_dtype: Fixed[str | None] = None
    """Number format of the model's weights; null is float32 on CPU and bfloat16 on accelerators."""
    corpus: Place[paths.Named] = "wikipedia"
    """What the model reads: wikipedia, pydoc, or the path of .txt and .jsonl files."""
    text_field: Fixed[str] = "text"
    """The field of each `.jsonl` object that holds the text."""
    heldout_share: Fixed[float] = 0.05
    """Expected share of the documents held out from training, in (0, 1)."""
    hook: Fixed[str] = "blocks.15.hook_resid_post"
    """Place where activations are read; several, joined by commas and quoted, lie side by side in every row."""
    n_tokens: Fixed[int | None] = None
    """Tokens of training text in an epoch, rounded up to whole sequences; null is all of it."""
    heldout_tokens: Fixed[int | None] = None
    """Tokens of held-out text, rounded up to whole sequences; null is all of it."""
    context_length: Fixed[int] = 256
    """Tokens in a sequence, at least 2 and at most the model's context."""
    batch_sequences: Fixed[int] = 8
    """Sequences that the model runs at once, at least 1; a lane holds the rows of one or two such batches."""
    dtype: Fixed[store_format.StoreDtype] = store_format.StoreDtype.bfloat16
    """Number format of the rows; one that would overflow is refused."""
    bos: Fixed[str] = "auto"
    """Token that begins every segment: its text, "none", or "auto" for the one in the model's files."""
    mask_position_zero: Fixed[bool] = True
    """Whether the first token of every segment is left out."""
    sink_factor: Fixed[float | None] = 10.0
    """Tokens with a norm above this multiple of the median are left out, above 1; null keeps all."""
    sink_calibration_tokens: Fixed[int] = 4096
    """Tokens at the beginning of the training text that the median is taken over, at least 1."""

    def __post_init__(self):
        numeric.check(self, "source.")
        object.__setattr__(self, "model", located(self.model, "source.model"))
        if _named(self.corpus) is None:
            object.__setattr__(self, "corpus", str(paths.local(self.corpus, "source.corpus")))
        try:
            self.harvest()  # refuses what a harvest would; opens no file
        except UserError as error:
            key = "" if str(error).startswith("source.") else "source."
            raise UserError(f"{key}{error}") from error

    def harvest(self) -> HarvestConfig:
        """The settings of the harvest that would write these rows."""
        names = {field.name for field in dataclasses.fields(self)} - {"corpus", "text_field", "heldout_share"}
        chosen = {name: getattr(self, name) for name in names}
        if (named := _named(self.corpus)) is not None:
            corpus = _of_live(named)(heldout_share=self.heldout_share)
        else:
            files = _of_live(text.TextFiles)
            corpus = files(path=self.corpus, text_field=self.text_field, heldout_share=self.heldout_share)
        return HarvestConfig(**chosen, text=corpus, shard_sequences=self.batch_sequences)

    @property
    def d_in(self) -> int:
        """Width of a row, from the configuration of the model."""
        return sum(self.site_widths)

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Widths at the hooks."""
        hooks = self.harvest().hooks
        if self.model.startswith(harvest.TORCH_PREFIX):
            return tuple(map(_model(self).run.backend.hook_width, hooks))
        config = _config(self.model)
        return tuple(hooks_.width(hooks_.parse(hook, config), config) for hook in hooks)

    def identity(self) -> dict[str, Any]:
        """The weights, the tokens of both splits, and what decides which of them have a row; loads the model."""
        return {"type": self.name, **_model(self).identity}

    def fingerprint(self) -> dict[str, Any]:
        """Settings and identity of the text; the full identity would need the loaded model."""
        config = self.harvest()
        return {"type": self.name, **config.settings(), "text": config.text.identity()}

    def differs_from(self, saved: Mapping[str, Any]) -> str | None:
        """As of every source; of a fingerprint the settings are compared, names of files apart."""
        if "train" in recorded(saved):
            return super().differs_from(saved)
        then, now = _settings(saved), _settings(self.fingerprint())
        return differences(then, {key: value for key, value in now.items() if key in then})

    def open(self, *, n_lanes: int, block_rows: int, lanes: range, seed: int) -> "LiveStream":
        """Rows of the training text, its batches of sequences shuffled anew each epoch."""
        check_lanes(n_lanes=n_lanes, block_rows=block_rows, lanes=lanes)
        if jax.process_count() > 1:
            raise UserError("source=language_model runs in one process; harvest first, and train with source=store")
        model, group = _model(self), self.batch_sequences

        def opened() -> tuple[Start, dict[str, Any]]:
            run, train = model.run, model.train
            if len(train) < group:
                raise UserError(f"source.batch_sequences must be at most {len(train)}, all of the text, got {group}")
            order = shuffled_blocks(n_blocks=len(train), n_lanes=group, seed=seed)

            def start(lane: int, number: int) -> Callable[[], np.ndarray]:
                places = np.asarray(order[number * n_lanes + lane])
                return run.start([train[place] for place in places])

            facts = {"rows": None, "lanes": n_lanes, "block_rows": block_rows, "seed": seed, "data": model.data}
            return start, facts

        def reopen(data: Any) -> tuple[Start, dict[str, Any]] | None:
            return opened() if model.goes_on_as(data) else None

        start, facts = opened()
        return LiveStream(start, lanes, block_rows, facts, reopen)

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the held-out text, in order; computed once, then kept."""
        return _model(self).heldout(batch, max_rows)


Start = Callable[[int, int], Callable[[], np.ndarray]]
"""(lane, number) -> what waits for the rows of a lane's batch of sequences."""


class LiveStream:
    """Records out of lanes that run a language model as they need rows; meets RowIterator."""

    n_rows: int | None = None

    def __init__(
        self,
        start: Start,
        lanes: range,
        block_rows: int,
        identity: dict[str, Any],
        reopen: Callable[[Any], tuple[Start, dict[str, Any]] | None] = lambda data: None,
    ):
        """Opens the stream.

        Args:
            start: see `Start`.
            lanes: the lanes to read.
            block_rows: rows per lane and step.
            identity: what the rows depend on, as in `loader.Stream`.
            reopen: from the data of a position to `start` and `identity` for them, None where they are other data.
        """
        self._start, self._numbers, self._block_rows, self._identity = start, lanes, block_rows, identity
        self._reopen = reopen
        self._begin(0, {str(lane): [0, 0] for lane in lanes})

    def _begin(self, position: int, places: dict[str, list[int]]) -> None:
        self._position = position
        self._lanes = [
            _Lane(functools.partial(self._start, lane), *map(int, places[str(lane)])) for lane in self._numbers
        ]

    def __iter__(self) -> "LiveStream":
        return self

    def __next__(self) -> np.ndarray:
        record = self.record(self._position)
        self._position += 1
        return record

    def record(self, number: int) -> np.ndarray:
        """A record by its number; the position stays.

        Raises:
            UserError: it lies before the position that this stream was opened or resumed at.
        """
        first = number * self._block_rows
        return np.stack([lane.rows(first, first + self._block_rows) for lane in self._lanes])

    def starts(self, number: int) -> None:
        """Rows have no number of their own."""

    def get_state(self) -> dict[str, Any]:
        """Number of the next record; per lane the batch of sequences it begins in, and the lane's rows before that."""
        places = {
            str(number): lane.place(self._position * self._block_rows)
            for number, lane in zip(self._numbers, self._lanes, strict=True)
        }
        return {"position": self._position, "stream": self._identity, "lanes": places}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position of the same stream.

        Raises:
            UserError: the state belongs to other data, another batch or another seed, or lacks a lane.
        """
        saved = state["stream"].get("data") if isinstance(state["stream"], dict) else None
        if saved != self._identity.get("data") and (again := self._reopen(saved)) is not None:
            self._start, self._identity = again
        same_stream(state, self._identity)
        if missing := {str(lane) for lane in self._numbers} - set(state["lanes"]):
            raise UserError(f"the loader cannot continue: the position lacks lanes {', '.join(sorted(missing))}")
        self._begin(int(state["position"]), state["lanes"])


class _Lane:
    """The rows of one lane in order: those of its batches of sequences, one of which is always under way."""

    def __init__(self, start: Callable[[int], Callable[[], np.ndarray]], number: int = 0, first_row: int = 0):
        self._start, self._first = start, number
        self._begins = [first_row]  # of batch `number`, and of those after it as they become known
        self._held: tuple[int, np.ndarray] | None = None
        self._next: tuple[int, Callable[[], np.ndarray]] | None = None

    def rows(self, start: int, stop: int) -> Shaped[np.ndarray, "n d_in"]:
        """Rows start ... stop - 1 of the lane."""
        if start < self._begins[0]:
            raise UserError(f"row {start} of a lane lies before row {self._begins[0]}, which this run resumed at")
        parts: list[np.ndarray] = []
        while start < stop:
            place = bisect.bisect_right(self._begins, start) - 1
            rows = self._batch(place)
            if place + 1 == len(self._begins):
                self._begins.append(self._begins[place] + len(rows))
            parts.append(rows[start - self._begins[place] :][: stop - start])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(self, row: int) -> list[int]:
        """Number of the batch that holds a row, and the lane's rows before that batch."""
        place = bisect.bisect_right(self._begins, row) - 1
        return [self._first + place, self._begins[place]]

    def _batch(self, place: int) -> np.ndarray:
        if self._held is None or self._held[0] != place:
            under_way, self._next = self._next, None
            ready = under_way[1] if under_way and under_way[0] == place else self._start(self._first + place)
            self._next = place + 1, self._start(self._first + place + 1)  # the device goes on while the host waits
            self._held = place, ready()
        return self._held[1]


class _Model:
    """A loaded model, the packed text of both splits, and the held-out rows as far as they were asked for."""

    def __init__(self, source: Live):
        config = source.harvest()
        config.text.count(whole=None in (config.n_tokens, config.heldout_tokens))
        self._source, self._backend = source, harvest.load(config)
        self._read(config, begun=None)
        self.identity = self._identity()  # as it is read today, also where a run goes on as it began

    def _read(self, config: HarvestConfig, begun: dict[str, Any] | None) -> None:
        """Packs the text and measures the sinks; `begun` as `harvest.Run` takes it."""
        self.run = harvest.Run(config, (0, 1), self._backend, {}, begun)
        self.train, self._sequences = (list(self.run.sequences(split)) for split in text.SPLITS)
        surveys = {"train": packing.survey(self.train), "heldout": packing.survey(self._sequences)}
        limits = {split: (f"source.{key}", value) for split, (key, value) in config.limits().items()}
        packing.report(surveys, limits)
        self.run.measure_sink()
        assert self.run.sink is not None
        facts = {key: value for key, value in self.run.common.items() if key not in ("model", "shard_sequences")}
        facts["special_token_policy"] = special_tokens.tokens_of(facts["special_token_policy"])
        weights = {key: value for key, value in self.run.common["model"].items() if key != "name"}
        self.data = digest([facts, weights, surveys["train"].sha256, self.run.sink.to_json(), config.batch_sequences])
        self._surveys = surveys
        self._rows: list[np.ndarray] = []

    def _identity(self) -> dict[str, Any]:
        config, model, sink = self.run.config, self.run.common["model"], self.run.sink
        assert sink is not None
        known = next((key for key in ("sha256", "bytes") if isinstance(model.get(key), dict)), None)
        weights = {known: sorted(model[known].values())} if known else {"name": pathlib.PurePath(model["name"]).name}
        return {
            "hook": config.hook,
            "d_in": self.run.d_in,
            "dtype": config.dtype.value,
            "context_length": config.context_length,
            "sink": {key: value for key, value in sink.to_json().items() if key != "median_norm"},
            "model": {"family": model["family"], "dtype": model["dtype"], **weights},
            **{split: {"sequences": s.n_sequences, "sha256": s.sha256} for split, s in self._surveys.items()},
        }

    def goes_on_as(self, data: Any) -> bool:
        """Reads text and begins segments as earlier versions did, if `data` were made so; returns whether they were."""
        earlier, now = self.run.tokenizer.earlier_bos(), self._source.harvest()
        begun: list[dict[str, Any] | None] = [None]
        if self._source.bos == "auto" and earlier != self.run.packer.bos_id:
            begun.append({"special_token_policy": {"bos_id": earlier}})
        before = dataclasses.replace(now, text=now.text.as_begun([{}]))
        configs = [now, before] if before != now else [now]
        kept = dict(vars(self))
        for config, policy in itertools.product(configs, begun):
            if config is now and policy is None:
                continue
            found = False
            try:
                self._read(config, policy)
                found = self.data == data
            except UserError as error:  # one document, which earlier versions could not split
                logger.debug("not as before: %s", error)
            finally:
                if not found:
                    vars(self).update(kept)
            if found:
                return True
        return False

    def heldout(self, batch: int, max_rows: int | None) -> Iterator[np.ndarray]:
        size, begun, given = self.run.config.batch_sequences, 0, 0
        waiting = np.empty((0, self.run.d_in), self.run.dtype)
        while (max_rows is None or given < max_rows) and (begun * size < len(self._sequences) or len(waiting)):
            while len(waiting) < batch and begun * size < len(self._sequences):
                if begun == len(self._rows):
                    self._rows.append(self.run.start(self._sequences[begun * size :][:size])())
                waiting, begun = np.concatenate([waiting, self._rows[begun]]), begun + 1
            wanted = batch if max_rows is None else min(batch, max_rows - given)
            if len(waiting[:wanted]):
                yield waiting[:wanted]
            given, waiting = given + len(waiting[:wanted]), waiting[wanted:]


def _settings(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in a fingerprint, without the places of model and text."""
    facts = {key: value for key, value in fingerprint.items() if key not in ("identity", "model")}
    if isinstance(text_ := facts.get("text"), dict):
        facts["text"] = {key: value for key, value in text_.items() if key != "path"}
        files = (text_.get("origin") or {}).get("files") if isinstance(text_.get("origin"), dict) else None
        if isinstance(files, list):
            facts["text"]["origin"] = [file[-1] for file in files if isinstance(file, (list, tuple)) and file]
    return facts


@functools.lru_cache(maxsize=1)
def _model(source: Live) -> _Model:
    return _Model(source)


@functools.lru_cache(maxsize=1)
def _config(model: str) -> language_model.ModelConfig:
    return language_model.read_config(model)
