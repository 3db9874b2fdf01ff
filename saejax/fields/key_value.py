"""Parser of key=value overrides: accepts what Hydra's grammar accepts, or fails in one line that shows the text.

Hydra composes first and complains later, in the words of its parser. So saejax checks the form of every override here,
before Hydra sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saejax.errors import UserError

_NAME = r"[A-Za-z_]\w*"
_DOTTED = re.compile(rf"{_NAME}(\.{_NAME})*")
_OF_HYDRA = re.compile(rf"(\+\+|\+|~)?{_NAME}([./@:\-]{_NAME})*(@[\w.]*)?")
"""A key, or a group with its folders and package, after what adds or deletes it."""

_ALLOWED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "a text"}
"""What OmegaConf calls the type of a field, and what may be given for it."""

_QUOTES = "a value that holds , = : ( ) [ ] { } or a space goes in quotes, key=\"'value'\""


def parsed(words: Iterable[str]) -> list[Override]:
    """Overrides of a Hydra command line, read.

    Args:
      words: `key=value` each, also with `+` or `++`, or `~key`; without flags.

    Raises:
      UserError: the first one that is none.

    Examples:
      >>> [(found.key_or_group, found.value()) for found in parsed(["sae=topk", "sae.k=4"])]
      [('sae', 'topk'), ('sae.k', 4)]
      >>> parsed(["sae..k=3"])
      Traceback (most recent call last):
      saejax.errors.UserError: sae..k=3: expected key=value, with a key such as sae.k
    """
    parser, found = OverridesParser.create(), []
    for word in words:
        key, equals, _ = word.partition("=")
        if not _OF_HYDRA.fullmatch(key) or not equals and not key.startswith("~"):
            raise UserError(f"{shown(word)}: expected key=value, with a key such as sae.k")
        try:
            found.append(parser.parse_override(word))
        except (HydraException, ValueError) as error:
            raise UserError(f"{shown(word)}: the value cannot be read; {_QUOTES}") from error
    return found


def check_choices(overrides: Iterable[Override], conf_dir: str, without_file: Mapping[str, Iterable[str]]) -> None:
    """Refuse a group's choice that is not a name, and the deletion of a key that is not a group.

    Hydra would let a deleted field fall back to a default that no file names.

    Args:
      overrides: of `parsed`.
      conf_dir: holds a folder for every group, with a file for every choice.
      without_file: further choices of each group.

    Raises:
      UserError: as in `optim=nan` and `~seed`.
    """
    for override in overrides:
        group = override.key_or_group.partition("@")[0]
        allowed = sorted(
            {*(path.stem for path in (Path(conf_dir) / group).glob("*.yaml")), *without_file.get(group, ())}
        )
        if override.is_delete() and not allowed and not override.key_or_group.startswith("hydra"):
            raise UserError(f"{shown(str(override.input_line))}: a field is not deleted but given another value")
        value = None if override.is_delete() or override.is_sweep_override() else override.value()
        if allowed and value is not None and (value == "???" or not isinstance(value, str | dict)):
            raise UserError(f"{shown(str(override.input_line))}: no such choice; choose one of {', '.join(allowed)}")


def dotlist(words: Iterable[str]) -> DictConfig:
    """`key=value` each as a config to merge, where keys have no marks of Hydra and values are YAML.

    Raises:
      UserError: the first one that is none.

    Examples:
      >>> dotlist(["optim.lr=0.1"])
      {'optim': {'lr': 0.1}}
    """
    words = list(words)
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not _DOTTED.fullmatch(key):
            raise UserError(f"{shown(word)}: expected key=value, with a key such as optim.lr")
        try:
            OmegaConf.from_dotlist([word])
        except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{shown(word)}: the value cannot be read") from error
    return OmegaConf.from_dotlist(words)


def wrong_value(text: str) -> str | None:
    """OmegaConf's message about a value of the wrong type, as "must be ..., got ..."; None for other messages.

    Args:
      text: of its error.
    """
    converted = re.search(r"Value '(.*?)' of type '\w+' (?:could not be converted to|is not a valid) (\w+)", text, re.S)
    if converted and converted[2] in _ALLOWED:
        return f"must be {_ALLOWED[converted[2]]}, got {shown(converted[1])}"
    null = re.search(r"field '.*' is not Optional|Incompatible value 'None'", text)
    return "must have a value, got null" if null else None


def shown(word: str) -> str:
    """A word of the command line in a message: on one line, of moderate length, bytes that are no UTF-8 as escapes."""
    text = word.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if not text:
        return "''"
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"
