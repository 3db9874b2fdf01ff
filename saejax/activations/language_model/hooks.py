"""Hook names: the places in a model that can be read or replaced, in TransformerLens' naming.

The form is `blocks.{layer}.{site}`. A block visits its sites in the order of `SITES`; `model.py` calls them,
`backend.py` reads and replaces them.

`ln1.hook_normalized` (input of attention) and `ln2.hook_normalized` (input of the MLP) hold TransformerLens' values
for a model whose norms are not folded into the next weights. Under an RMS norm that is x / rms(x), BEFORE the gain.
Under GPT-2's layer norm it is the output, gain and bias INCLUDED. A transcoder trained elsewhere on a folded GPT-2
expects rows without gain and bias.
"""

from __future__ import annotations

import dataclasses
import re

from saejax.activations.language_model.config import ModelConfig
from saejax.errors import UserError

RESID_PRE = "hook_resid_pre"
LN1 = "ln1.hook_normalized"
Z = "attn.hook_z"
ATTN_OUT = "hook_attn_out"
RESID_MID = "hook_resid_mid"
LN2 = "ln2.hook_normalized"
MLP_POST = "mlp.hook_post"
MLP_OUT = "hook_mlp_out"
RESID_POST = "hook_resid_post"
SITES = (RESID_PRE, LN1, Z, ATTN_OUT, RESID_MID, LN2, MLP_POST, MLP_OUT, RESID_POST)


@dataclasses.dataclass(frozen=True)
class Hook:
    """One place in one layer."""

    layer: int
    """Block, from 0."""
    site: str
    """One of `SITES`."""

    @property
    def name(self) -> str:
        """The name that users write."""
        return f"blocks.{self.layer}.{self.site}"

    @property
    def n_layers(self) -> int:
        """Blocks that must run before this place holds its value."""
        return self.layer if self.site == RESID_PRE else self.layer + 1


def parse(name: str, config: ModelConfig) -> Hook:
    """The place that a name means in a model.

    Args:
      name: for example `blocks.15.hook_resid_post`.
      config: of the model.

    Returns:
      The hook.

    Raises:
      UserError: no such site, or no such layer.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in SITES:
        raise UserError(f"hook={name!r} is unknown, allowed: blocks.<layer>. followed by one of {', '.join(SITES)}")
    layer = int(match[1])
    if layer >= config.n_layers:
        raise UserError(f"hook={name!r}: layer {layer} does not exist, allowed: 0 to {config.n_layers - 1}")
    return Hook(layer, match[2])


def width(hook: Hook, config: ModelConfig) -> int:
    """Coordinates at a hook: d_model, except inside attention (heads side by side) and MLP."""
    return {Z: config.n_heads * config.d_head, MLP_POST: config.d_mlp}.get(hook.site, config.d_model)
