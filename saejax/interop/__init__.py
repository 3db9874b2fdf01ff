"""Other people's formats, one file each: `export` writes one, `load` finds out which one it was given.

On top of everything else. A new format is a module with `export(sae, path)`, `load(path)` and `detect(path)`,
entered into FORMATS.
"""

import os
import pathlib
from types import ModuleType

from saejax.errors import UserError
from saejax.interop import saelens
from saejax.sae.model import SAE

FORMATS: dict[str, ModuleType] = {"saelens": saelens}
"""Every format by its name."""


def export(sae: SAE, path: str | os.PathLike, format: str = "saelens") -> pathlib.Path:
    """Writes an SAE in somebody else's format.

    Args:
      sae: The SAE.
      path: Directory to write; made where missing.
      format: One of FORMATS.

    Returns:
      The directory.

    Raises:
      UserError: the format is unknown, or cannot hold this architecture.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: must be one of {', '.join(FORMATS)}")
    return FORMATS[format].export(sae, path)


def load(path: str | os.PathLike) -> SAE:
    """Reads an SAE in any of FORMATS.

    Raises:
      UserError: no format recognises `path`, or one does and finds it wrong.
    """
    path = pathlib.Path(path)
    for module in FORMATS.values():
        if module.detect(path):
            return module.load(path)
    raise UserError(f"{path}: none of the known formats ({', '.join(FORMATS)})")
