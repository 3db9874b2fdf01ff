"""`TrainConfig`: settings of a training run besides its SAE, data and optimiser."""

from __future__ import annotations

import dataclasses
import enum

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed, Free, Place
from saejax.training import liveness


class DecoderBias(enum.Enum):
    """Start of the decoder bias."""

    geometric_median = "geometric_median"
    mean = "mean"
    zero = "zero"


class EncoderBias(enum.Enum):
    """Start of the encoder biases."""

    zero = "zero"
    firing_rate = "firing_rate"


class OnNonfinite(enum.Enum):
    """Reaction to a step that is not finite."""

    stop = "stop"
    skip = "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, data preparation and rhythm of a run. All counts are in rows (one row is one token)."""

    n_tokens: Free[int] = 3_072_000
    """Rows to train on, rounded down to whole batches; epochs repeat, reshuffled, when the source holds fewer."""
    batch: Fixed[int] = 512
    """Rows per step over all devices; a multiple of `n_lanes`."""
    n_lanes: Fixed[int] = 8
    """Parallel lanes of the data stream. Any mesh.data and number of processes that divide it see the same batches."""
    b_dec_init: Fixed[DecoderBias] = DecoderBias.geometric_median
    """Start of the decoder bias, from the first buffer filling: geometric_median, mean or zero."""
    b_enc_init: Fixed[EncoderBias] = EncoderBias.zero
    """Start of the encoder biases: zero, or firing_rate: so that each latent fires on `firing_rate` of the rows."""
    firing_rate: Fixed[float | None] = None
    """Share of rows on which a latent fires at the start, in (0, 1), with b_enc_init=firing_rate; null takes
    10,000 / d_sae, at most 0.5."""
    dead_after_tokens: Free[int | None] = None
    """A latent is dead after this many rows without firing. null takes a thirty-second of the run, at most 10M."""
    resample_every_steps: Free[int | None] = None
    """Steps between two resamplings of dead latents, which then restart from badly reconstructed rows; null never
    does. New latents need the rest of the run to learn."""
    ema_decay: Fixed[float | None] = None
    """Decay of the running average of the parameters, in (0, 1), say 0.999; the average is then evaluated, exported and
    loaded. null keeps none."""
    log_every_steps: Free[int] = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every_steps: Free[int | None] = 500
    """Steps between two held-out evaluations; null evaluates at the end only."""
    eval_rows: Free[int] = 8_192
    """Held-out rows per evaluation during training."""
    on_nonfinite: Free[OnNonfinite] = OnNonfinite.stop
    """Reaction to a loss or parameters that are not finite: stop keeps the last good checkpoint; skip leaves the step
    out, so that parameters, optimiser and liveness stay as they are. Both save its rows under nonfinite/."""
    max_skipped_steps: Free[int] = 10
    """Number of skipped steps in a row that stops the run; at least 1."""
    measure_peak: Place[bool] = False
    """Whether to measure the peak FLOP/s of a device that the table lacks, such as a CPU, at the start, so that mfu can
    be logged; takes a fraction of a second."""
    profile: Place[bool] = False
    """Whether ten steps after the first ten are recorded by JAX's profiler, into profile/ of the run directory."""

    def __post_init__(self) -> None:
        numeric.check(self, "train.")
        for name in ("batch", "n_lanes", "log_every_steps", "eval_rows", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every_steps", "resample_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} must be at least 1 or null, got {value}")
        for name in ("firing_rate", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"train.{name} must be in (0, 1) or null, got {value}")
        if self.firing_rate is not None and self.b_enc_init is not EncoderBias.firing_rate:
            raise UserError("train.firing_rate needs train.b_enc_init=firing_rate, got " + self.b_enc_init.name)
        if self.batch % self.n_lanes:
            raise UserError(f"train.batch must be a multiple of train.n_lanes={self.n_lanes}, got {self.batch}")
        if self.n_tokens < self.batch:
            raise UserError(f"train.n_tokens must be at least train.batch={self.batch}, got {self.n_tokens}")
        if self.n_steps > numeric.LARGEST:
            most = (numeric.LARGEST + 1) * self.batch - 1
            raise UserError(
                f"train.n_tokens must be at most {most}, {numeric.LARGEST} steps of train.batch={self.batch}, "
                f"got {self.n_tokens}"
            )
        if self.dead_after_tokens is not None and not 1 <= self.dead_after_tokens < liveness.MAX_TOKENS:
            raise UserError(
                f"train.dead_after_tokens must be in [1, {liveness.MAX_TOKENS}) or null, got {self.dead_after_tokens}"
            )

    @property
    def n_steps(self) -> int:
        """Whole steps of the run."""
        return self.n_tokens // self.batch

    @property
    def block_rows(self) -> int:
        """Rows that each lane adds to a step."""
        return self.batch // self.n_lanes

    @property
    def dead_window_tokens(self) -> int:
        """`dead_after_tokens` with null resolved."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(self.batch, min(self.n_tokens // 32, 10_000_000))

    def rate(self, d_sae: int) -> float:
        """`firing_rate` with null resolved."""
        return min(10_000 / d_sae, 0.5) if self.firing_rate is None else self.firing_rate
