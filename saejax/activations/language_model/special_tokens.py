"""First token of every segment in a harvest, kept when an existing store continues.

`language_model.bos` decides; a manifest stores the decision with its reason in `special_token_policy`. A store keeps
its first decision, so all its shards agree even if a newer saejax would decide differently.
"""

import logging
import pathlib
from typing import Any

from saejax.activations.language_model import FileTokenizer
from saejax.activations.language_model.harvest_config import HarvestConfig
from saejax.activations.packing import Packer
from saejax.errors import UserError

logger = logging.getLogger(__name__)

WHY = ("reason", "left_out")
"""Fields of a policy for people; no tokens depend on them, and older manifests lack them."""


def chosen(config: HarvestConfig, tokenizer: FileTokenizer, begun: dict | None) -> tuple[Packer, dict[str, Any]]:
    """The packer of a harvest, and what manifests say of it.

    Args:
      config: its settings.
      tokenizer: of its model.
      begun: the manifest of a store that goes on.

    Returns:
      The packer, and the field `special_token_policy`.

    Raises:
      UserError: `bos` is no token, or a file contradicts itself.
    """
    if tokenizer.left_out:
        logger.warning("ignoring %s of the tokenizer's file", ", ".join(tokenizer.left_out))
    kept = _kept(begun, tokenizer)
    if kept is not None and config.bos == "auto":
        _say_if_other(kept["bos_id"], tokenizer)
        return _packed(config, kept["bos_id"], {key: kept[key] for key in WHY if key in kept})
    bos = tokenizer.bos(config.bos)
    if kept is not None:
        return _packed(config, bos.id, {key: kept[key] for key in WHY if key in kept})
    logger.info("segments begin with %s (%s)", "no token" if bos.id is None else f"token {bos.id}", bos.reason)
    left_out = {"left_out": list(tokenizer.left_out)} if tokenizer.left_out else {}
    return _packed(config, bos.id, {"reason": bos.reason} | left_out)


def tokens_of(policy: dict[str, Any]) -> dict[str, Any]:
    """The part of a policy that tokens depend on."""
    return {key: value for key, value in policy.items() if key not in WHY}


def check_same_tokens(path: pathlib.Path, begun: dict | None, sha256: str, tokenizer: FileTokenizer) -> None:
    """Refuses a store of a version that obeyed the tokenizer file's settings, if they changed the tokens.

    Raises:
      UserError: its missing shards would hold other text than those that are there.
    """
    if begun is not None and tokenizer.left_out and begun.get("tokens_sha256") != sha256:
        raise UserError(
            f"the store at {path} was begun with other tokens: the tokenizer's file carries "
            f"{', '.join(tokenizer.left_out)}, which was obeyed then and is left out now; choose another path"
        )


def _packed(config: HarvestConfig, bos_id: int | None, why: dict[str, Any]) -> tuple[Packer, dict[str, Any]]:
    packer = Packer(config.context_length, bos_id)
    return packer, packer.policy() | why


def _kept(begun: dict | None, tokenizer: FileTokenizer) -> dict[str, Any] | None:
    """The policy of a store, None where its manifest holds none that could be."""
    policy = (begun or {}).get("special_token_policy")
    if not isinstance(policy, dict) or "bos_id" not in policy:
        return None
    bos_id = policy["bos_id"]
    if bos_id is None:
        return policy
    known = isinstance(bos_id, int) and not isinstance(bos_id, bool) and 0 <= bos_id < 2**31
    return policy if known and tokenizer.tokenizer.id_to_token(bos_id) is not None else None


def _say_if_other(bos_id: int | None, tokenizer: FileTokenizer) -> None:
    try:
        now = tokenizer.bos("auto")
    except UserError as error:
        logger.warning("continuing with bos_id %s, as begun; now: %s", bos_id, error)
        return
    if now.id != bos_id:
        logger.warning(
            "continuing with bos_id %s, as begun; bos=auto now gives %s (%s): harvest to another path to use that",
            bos_id, now.id, now.reason,
        )  # fmt: skip
