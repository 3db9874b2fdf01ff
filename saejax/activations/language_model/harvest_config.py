"""`HarvestConfig`: the settings of `saejax harvest`."""

import dataclasses
import enum

from saejax.activations import packing
from saejax.activations.language_model import smollm2
from saejax.activations.sinks import Sink
from saejax.activations.store.files import StoreDtype
from saejax.activations.text import TextCorpus, Wikipedia
from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.parallel import sharding

TORCH_PREFIX = "torch:"
"""Marks a model that PyTorch runs; its hooks are module paths."""


def located(model: str, field: str) -> str:
    """Name of a language model, absolute if it is a path, so that it is valid in any working directory.

    Args:
      model: `smollm2`; a path; `torch:` and a path, or a name that transformers knows.
      field: key that it was given by.

    Raises:
      UserError: an address.
    """
    if not model.startswith(TORCH_PREFIX):
        return model if model == smollm2.NAME else str(paths.local(model, field))
    path = paths.local(model.removeprefix(TORCH_PREFIX), field)
    return f"{TORCH_PREFIX}{path}" if path.exists() else model


class OnNonfinite(enum.Enum):
    """Reaction to an activation that is not finite."""

    stop = "stop"
    drop = "drop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Settings of a harvest: what it reads, runs and writes."""

    model: paths.Named = "smollm2"
    """The language model: a Hugging Face directory, a `.gguf` file, or "smollm2" for the default model;
    "torch:" and a directory for any model that transformers loads, with module paths as hooks."""

    model_dtype: str | None = None
    """Number format of the model's weights; null is float32 on CPU and bfloat16 on accelerators."""

    text: TextCorpus = dataclasses.field(default_factory=Wikipedia)
    """What the model reads: wikipedia, pydoc, or files with a path; also how much of it is held out."""

    hook: str = "blocks.15.hook_resid_post"
    """Place where activations are read, by its TransformerLens name; only the layers below it run. Several, joined by
    commas and quoted ('hook="A,B"'), are read in one pass and stored side by side in every row."""

    path: paths.Local = "activations"
    """Directory of the two stores, `train` and `heldout`."""

    n_tokens: int | None = None
    """Tokens of training text to run, rounded up to whole sequences; null is all of it."""

    heldout_tokens: int | None = None
    """Tokens of held-out text to run, rounded up to whole sequences; null is all of it."""

    context_length: int = 256
    """Tokens in a sequence, at least 2 and at most the model's context."""

    batch_sequences: int = 8
    """Sequences that the model runs at once; divides shard_sequences. No effect on what is stored
    beyond rounding; at least one for every device along mesh.data keeps all of them busy."""

    shard_sequences: int = 64
    """Sequences in a shard; a stopped harvest loses at most one shard. Thousands for large stores."""

    dtype: StoreDtype = StoreDtype.bfloat16
    """Number format of the stored rows; one that would overflow is refused."""

    bos: str = "auto"
    """Token that begins every segment: its text, "none", or "auto" for the one in the model's files."""

    mask_position_zero: bool = True
    """Whether the first token of every segment is left out; it is an attention sink in most models."""

    sink_factor: float | None = 10.0
    """Tokens with a norm above this multiple of the median are left out, above 1; null keeps all."""

    sink_calibration_tokens: int = 4096
    """Tokens at the beginning of the training text that the median is taken over, at least 1."""

    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """Reaction to a token whose activation is NaN or infinite: stop names its document; drop leaves it out and counts
    it in the manifest."""

    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    """Devices of this process that run the model: sequences over data, heads and MLP units over latent. No effect
    on what is stored beyond rounding; "torch:" models run on one device."""

    process: int | None = None
    """Number of this process among those that share the harvest; null takes what mesh.distributed finds."""

    n_processes: int | None = None
    """How many processes share the harvest, each with its own model; null takes what mesh.distributed finds."""

    def __post_init__(self):
        numeric.check(self)
        paths.settle(self)
        object.__setattr__(self, "model", located(self.model, "model"))
        object.__setattr__(self, "hook", ",".join(part.strip() for part in self.hook.split(",")))
        if "" in self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise UserError(f"hook must name one place, or several different ones joined by commas, got {self.hook!r}")
        for name in ("batch_sequences", "shard_sequences", "n_tokens", "heldout_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")
        if self.shard_sequences % self.batch_sequences:
            raise UserError(
                f"shard_sequences must be a multiple of batch_sequences={self.batch_sequences}, "
                f"got {self.shard_sequences}"
            )
        if (self.process is None) != (self.n_processes is None):
            raise UserError("process and n_processes must be given together")
        if self.process is not None and self.n_processes is not None:
            if not 0 <= self.process < self.n_processes:
                raise UserError(f"process must be in [0, n_processes={self.n_processes}), got {self.process}")
        packing.Packer(self.context_length, bos_id=None)
        self.sink()

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names in `hook`, in the order in which they lie in a row."""
        return tuple(self.hook.split(","))

    def limits(self) -> dict[str, tuple[str, int | None]]:
        """Split -> (the key that limits its tokens, its value)."""
        return {"train": ("n_tokens", self.n_tokens), "heldout": ("heldout_tokens", self.heldout_tokens)}

    def place(self) -> tuple[int, int]:
        """(number of this process, how many share the harvest); none of them waits for another."""
        if self.process is not None and self.n_processes is not None:
            return self.process, self.n_processes
        return self.mesh.apart()

    def sink(self) -> Sink:
        """The sink rule, its median not measured yet."""
        return Sink(
            factor=self.sink_factor,
            mask_position_zero=self.mask_position_zero,
            calibration_tokens=self.sink_calibration_tokens,
        )

    def settings(self) -> dict:
        """The choices that the stores' content depends on, for the manifest."""
        elsewhere = {"text", "path", "batch_sequences", "mesh", "process", "n_processes"}
        if self.on_nonfinite is OnNonfinite.stop:
            elsewhere.add("on_nonfinite")  # so that older stores, which do not say it, are the same
        names = [field.name for field in dataclasses.fields(self) if field.name not in elsewhere]
        chosen = {name: getattr(self, name) for name in names}
        return {name: value.value if isinstance(value, enum.Enum) else value for name, value in chosen.items()}
