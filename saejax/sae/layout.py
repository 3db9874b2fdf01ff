"""Layout of an SAE: its sizes, sites and numerics, for encoders, constraints and losses.

Every architecture's config holds these fields: it is a `Layout` with methods (`base.Sparsifier`). The widths of
parameters and rows derive from them here, and impossible combinations are refused here.
"""

import dataclasses
import enum
from typing import Any

from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed, Free


class MatmulDtype(enum.Enum):
    """Precision of the operands of the large products; results and master weights are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class EncoderKind(enum.Enum):
    """The map from a row to the pre-activations of the latents."""

    linear = "linear"
    """One matrix."""
    tied = "tied"
    """One matrix that stays the decoder's transpose; its gradient is added to the decoder's."""
    mlp = "mlp"
    """A hidden ReLU layer of `encoder_hidden` units before the matrix."""
    lista = "lista"
    """`encoder_steps` unrolled steps of iterative thresholding with one matrix: step 1 is the linear encoder."""


class EncoderInit(enum.Enum):
    """Start of the encoder."""

    transpose = "transpose"
    """W_enc = W_dec.T: a latent first reads the direction that it writes; far fewer latents die."""
    independent = "independent"
    """Directions of its own, with the decoder's norm."""


class Family(enum.Enum):
    """Sites of a row that an SAE reads and writes."""

    sae = "sae"
    """The one site is read and written."""
    transcoder = "transcoder"
    """The first half of the sites is read, the second half written."""
    crosscoder = "crosscoder"
    """All sites are read and written."""
    clt = "clt"
    """Cross-layer transcoder: group g of the latents reads in-site g and writes out-sites g and later."""


HALVED = (Family.transcoder, Family.clt)
"""Families whose target differs from their input."""


def read(family: Family, sites: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the widths of the sites that are read."""
    return sites[: len(sites) // 2] if family in HALVED else sites


def written(family: Family, sites: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the widths of the sites that are written.

    Examples:
      >>> written(Family.clt, (8, 8, 8, 8)), written(Family.crosscoder, (8, 4))
      ((8, 8), (8, 4))
    """
    return sites[len(sites) // 2 :] if family in HALVED else sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Fields that every architecture has, and the widths that follow from them."""

    d_in: Fixed[int]
    """Width of the input, at least 1; with several sites their sum."""
    d_sae: Fixed[int]
    """Number of latents; at least 1. Usual: 8 to 64 times d_in."""
    family: Fixed[Family] = Family.sae
    """`sae`, `transcoder` (reads the first half of the sites, writes the second), `crosscoder` (reads and writes all)
    or `clt` (cross-layer transcoder)."""
    sites: Fixed[tuple[int, ...]] = ()
    """Widths of the parts of a row (sites), in order; [] means one part. A source with several sites sets them."""
    skip: Fixed[bool] = False
    """Whether a transcoder also has a linear map from its input to its target, zero at the start."""
    matmul_dtype: Fixed[MatmulDtype] = MatmulDtype.float32
    """Operands of the encoder product; bfloat16 is faster, the result is float32 either way."""
    encoder: Fixed[EncoderKind] = EncoderKind.linear
    """`linear`, `tied` (the decoder's transpose), `mlp` (a hidden ReLU layer) or `lista` (unrolled thresholding)."""
    encoder_hidden: Fixed[int | None] = None
    """Hidden units of the mlp encoder, at least 1 (2 d_in where it starts as the transpose); null takes 2 d_in."""
    encoder_steps: Fixed[int] = 3
    """Steps of the lista encoder, at least 1; each costs two products."""
    encoder_init: Fixed[EncoderInit] = EncoderInit.transpose
    """Where the encoder starts: `transpose` (of the decoder; only where that writes what is read) or `independent`."""
    decoder_init_norm: Fixed[float] = 1.0
    """Norm of the decoder rows at the start, above 0; 1 where `unit_decoder` holds them there."""
    subtract_b_dec: Fixed[bool] = True
    """Whether the encoder reads x - b_dec (pre-encoder bias) or x; transcoders always read x."""
    unit_decoder: Fixed[bool] = True
    """Whether decoder rows are kept at norm 1, their gradients tangent to the sphere."""
    aux_alpha: Free[float] = 1 / 32
    """Weight of the AuxK loss against mse over variance, dimensionless; 0 turns it off. 1/32 as in Gao et al."""
    k_aux: Free[int | None] = None
    """Dead latents that explain the residual of a row, in [1, d_sae]; null takes half of d_in."""

    def __post_init__(self):
        numeric.check(self, "sae.")
        object.__setattr__(self, "sites", tuple(self.sites))  # a YAML list arrives as a list
        wide = all(width >= 1 for width in self.sites)  # before d_in, which presets take from their sum
        check(wide, "sites", "must be widths of at least 1", self.sites)
        check(self.d_in >= 1, "d_in", "must be at least 1", self.d_in)
        check(self.d_sae >= 1, "d_sae", "must be at least 1", self.d_sae)
        check_enum(self.family, Family, "family")
        check_enum(self.matmul_dtype, MatmulDtype, "matmul_dtype")
        check_enum(self.encoder, EncoderKind, "encoder")
        check_enum(self.encoder_init, EncoderInit, "encoder_init")
        check_sites(self)
        mirrored = self.encoder is EncoderKind.mlp and self.starts_mirrored
        least, why = (2 * self.d_in, " (2 d_in) for encoder_init=transpose") if mirrored else (1, "")
        in_range = self.encoder_hidden is None or self.encoder_hidden >= least
        check(in_range, "encoder_hidden", f"must be null or at least {least}{why}", self.encoder_hidden)
        check(self.encoder_steps >= 1, "encoder_steps", "must be at least 1", self.encoder_steps)
        check(self.decoder_init_norm > 0, "decoder_init_norm", "must be above 0", self.decoder_init_norm)
        same = not self.unit_decoder or self.decoder_init_norm == 1
        check(same, "decoder_init_norm", "must be 1 with unit_decoder=true", self.decoder_init_norm)
        check(self.aux_alpha >= 0, "aux_alpha", "must be at least 0", self.aux_alpha)
        in_range = self.k_aux is None or 1 <= self.k_aux <= self.d_sae
        check(in_range, "k_aux", f"must be null or in [1, d_sae={self.d_sae}]", self.k_aux)

    @property
    def mirrors(self) -> bool:
        """Whether the target is the input: `sae` and `crosscoder`."""
        return self.family not in HALVED

    @property
    def writes(self) -> tuple[int, ...]:
        """Widths of the sites that are written."""
        return written(self.family, self.sites or (self.d_in,))

    @property
    def d_out(self) -> int:
        """Width of the reconstruction and of a decoder row."""
        return sum(self.writes)

    @property
    def d_row(self) -> int:
        """Width of a training row: all sites."""
        return self.d_in if self.mirrors else self.d_in + self.d_out

    @property
    def n_groups(self) -> int:
        """Groups of latents that read a site each: the layers of a `clt`, else 1."""
        return len(self.sites) // 2 if self.family is Family.clt else 1

    @property
    def centres(self) -> bool:
        """Whether the encoder really subtracts b_dec, which only what writes its input can."""
        return self.subtract_b_dec and self.mirrors

    @property
    def starts_mirrored(self) -> bool:
        """Whether the encoder starts as the decoder's transpose."""
        return self.encoder_init is EncoderInit.transpose and self.mirrors

    @property
    def n_aux(self) -> int:
        """Dead latents per row in AuxK, with the default filled in."""
        return min(max(self.d_in // 2, 1), self.d_sae) if self.k_aux is None else self.k_aux

    @property
    def n_hidden(self) -> int:
        """Hidden units of an mlp encoder, with the default filled in."""
        return 2 * self.d_in if self.encoder_hidden is None else self.encoder_hidden

    def split(self, rows: Float[Array, "... d_row"]) -> tuple[Float[Array, "... d_in"], Float[Array, "... d_out"]]:
        """Splits rows into input and target."""
        return (rows, rows) if self.mirrors else (rows[..., : self.d_in], rows[..., self.d_in :])


def shared(layout: Layout) -> dict[str, Any]:
    """Returns the fields that every architecture has, for another architecture of the same sizes.

    Examples:
      >>> shared(Layout(d_in=8, d_sae=32))["d_sae"]
      32
    """
    return {field.name: getattr(layout, field.name) for field in dataclasses.fields(Layout)}


def check_sites(layout: Layout) -> None:
    """Refuses sites that do not suit the family, or a family that does not suit the encoder.

    Raises:
      UserError: naming the field, its value and what is allowed.
    """
    family, sites = layout.family, layout.sites
    check(all(width >= 1 for width in sites), "sites", "must be widths of at least 1", sites)
    many = f"must be transcoder, crosscoder or clt for rows of {len(sites)} sites"
    check(family is not Family.sae or len(sites) <= 1, "family", many, family.name)
    if family in HALVED:
        even = len(sites) >= 2 and len(sites) % 2 == 0
        check(even, "sites", f"must be an even number of widths for family={family.name}", sites)
    if family is Family.crosscoder:
        check(len(sites) >= 2, "sites", "must be two widths or more for family=crosscoder", sites)
    width = sum(read(family, sites)) if sites else layout.d_in
    must = f"must be {width}, the width that is read of sae.sites={sites}"
    check(layout.d_in == width, "d_in", must, layout.d_in)
    if family is Family.clt:
        inputs = read(family, sites)
        check(len(set(inputs)) == 1, "sites", "must read sites of one width for family=clt", inputs)
        parts = f"must be a multiple of the {len(inputs)} layers for family=clt"
        check(layout.d_sae % len(inputs) == 0, "d_sae", parts, layout.d_sae)
    only = "must be false but for family=transcoder"
    check(not layout.skip or family is Family.transcoder, "skip", only, layout.skip)
    kind = layout.encoder.name
    allowed = {Family.transcoder: ("linear", "mlp"), Family.clt: ("linear",)}.get(family, (kind,))
    check(kind in allowed, "encoder", f"must be {' or '.join(allowed)} for family={family.name}", kind)


def check(ok: bool, field: str, must: str, got: object) -> None:
    """Raises the user's one-line error about `sae.<field>` unless `ok`."""
    if not ok:
        raise UserError(f"sae.{field} {must}, got {got}")


def check_enum(value: object, kind: type[enum.Enum], field: str) -> None:
    """Raises the user's one-line error about `sae.<field>` unless `value` is a member of `kind`."""
    check(isinstance(value, kind), field, f"must be one of {', '.join(m.name for m in kind)}", value)
