"""Upload of an exported folder to a Hugging Face hub, on request only; the folder stays.

No other file knows `huggingface_hub` (extra `hub`). The token comes from `hf auth login` or HF_TOKEN; HF_ENDPOINT
names another hub.
"""

import importlib
import os
import re
from typing import Any

from saejax.errors import UserError
from saejax.fields import paths

IGNORED = ["dashboards/*"]
"""Never uploaded: dashboards quote the text behind the activations, which may not be free to publish."""


def check(repository: str) -> None:
    """Refuses, before any work is done, what `upload` would refuse at the end.

    Raises:
      UserError: no owner/name, the extra is not installed, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"hub={repository}: must be owner/name")
    if not _library().get_token():
        raise UserError(f"hub={repository}: there is no token; log in with `hf auth login`, or set HF_TOKEN")


def upload(folder: str | os.PathLike, repository: str, *, private: bool = False) -> str:
    """Uploads a folder as one commit, into a repository that is made where missing.

    Args:
      folder: What to upload; what IGNORED names stays behind.
      repository: owner/name.
      private: Whether a repository that has to be made is private.

    Returns:
      Address of the repository.

    Raises:
      UserError: as `check`, or the hub refuses or cannot be reached; the folder is as it was.
    """
    folder = paths.local(folder, "folder")
    check(repository)
    library, errors = _library(), importlib.import_module("huggingface_hub.errors")
    api = library.HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=IGNORED,
            commit_message="SAE, written by saejax",
        )
    except (OSError, ValueError, errors.HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"hub={repository}: nothing was published, {folder} stays as it is ({reason})") from None
    return str(address)


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            "huggingface_hub is missing, needed for hub=; install it with: pip install 'saejax[hub]'"
        ) from None
