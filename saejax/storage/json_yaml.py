"""Safe JSON and YAML: the readers of every configuration and manifest, also of untrusted ones.

They refuse tags, aliases, interpolations and endless nesting; a file that is not a mapping is an error of one line. A
run's config carries the version of its format, so a config from a newer saejax is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from saejax.errors import UserError
from saejax.storage import atomic
from saejax.storage.version import VERSION

RUN_FORMAT = 2
"""Version of what a run's config.yaml says; files without one are of version 1, which had no `run_id`."""

_STAMP = ("format_version", "saejax_version", "run_id", "older_up_to_step")
_POINTER = b"version https://git-lfs"
_LONGEST, _DEEPEST = 1000, 50
"""Characters of a message that quotes a file, and levels of a YAML file."""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file."""
    atomic.check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON ({one_line(error)}){pointer_hint(path)}") from None
    return _mapping(path, found)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file that says no more than JSON can: no tags, no aliases."""
    atomic.check_file(path)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainYaml)  # noqa: S506
        found = json.loads(json.dumps(found, default=str))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no valid YAML ({one_line(error)}){pointer_hint(path)}") from None
    return _mapping(path, found)


@dataclasses.dataclass(frozen=True)
class Stamp:
    """Metadata in a run's config.yaml beside the config.

    Attributes:
      run_id: names the run in its checkpoints; None in files of format 1.
      older_up_to_step: checkpoints up to this step were saved before the run had an id.
    """

    run_id: str | None = None
    older_up_to_step: int = -1


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Returns the content of a run's config.yaml without its stamp; see `read_run`."""
    return read_run(run_dir)[0]


def read_run(run_dir: Path) -> tuple[dict[str, Any], Stamp]:
    """Returns the content of a run's config.yaml, and its stamp.

    Args:
      run_dir: a run directory.

    Raises:
      UserError: no such file, no plain YAML, or the format of a newer saejax.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it holds no config.yaml")
    tree = read_yaml(path)
    version, writer, run_id, older = (tree.pop(key, None) for key in _STAMP)
    if version not in (None, 1, RUN_FORMAT) or isinstance(version, bool):
        raise UserError(
            f"{path} was written by saejax {one_line(writer)} in format {one_line(version)}; this is "
            f"{VERSION}, which reads formats up to {RUN_FORMAT}: install a newer one"
        )
    if version == RUN_FORMAT and not (isinstance(run_id, str) and run_id):
        raise UserError(f"{path}: run_id must be given in format {RUN_FORMAT}")
    if version != RUN_FORMAT and (run_id, older) != (None, None):
        raise UserError(f"{path}: run_id is of format {RUN_FORMAT}, and format_version is {one_line(version)}")
    if not (older is None or isinstance(older, int) and not isinstance(older, bool)):
        raise UserError(f"{path}: older_up_to_step must be a number, got {one_line(older)}")
    if any("${" in text for text in _texts(tree)):
        raise UserError(f"{path}: must hold values, not interpolations, and holds ${{...}}")
    for group in ("sae", "source"):
        part = tree.get(group)
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f"{path}: {group}.type must be given")
    return tree, Stamp(run_id, -1 if older is None else older)


def pointer_hint(path: Path) -> str:
    """Returns a hint for messages about an unreadable file that is a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            left = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    return "; it is a pointer of git-lfs, which stands for the file: fetch it with `git lfs pull`" if left else ""


def stamped(tree: dict[str, Any], stamp: Stamp) -> dict[str, Any]:
    """Returns the mapping of a config with its format, its writer and the stamp in front."""
    version = 1 if stamp.run_id is None else RUN_FORMAT
    said = {"format_version": version, "saejax_version": VERSION}
    if stamp.run_id is not None:
        said |= {"run_id": stamp.run_id}
    if stamp.older_up_to_step >= 0:
        said |= {"older_up_to_step": stamp.older_up_to_step}
    return said | tree


def inside(folder: Path, name: str) -> Path:
    """Returns the file of that name, which must lie in the folder, whatever links say.

    A repository in a hub's cache, whose files are links into the `blobs` beside `snapshots`, counts as one folder.

    Raises:
      UserError: it leads somewhere else.
    """
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL
        raise UserError(f"{one_line(path)}: no path ({one_line(error)})") from None
    snapshots = (above for above in (root, *root.parents) if above.parent.name == "snapshots")
    if not target.is_relative_to(root) and target.parent not in [s.parent.parent / "blobs" for s in snapshots]:
        raise UserError(f"{one_line(path)}: leads out of its folder, to {one_line(target)}")
    return path


def one_line(found: object) -> str:
    """Returns the text of a message that quotes a file: printable, one line, cut short."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(found).splitlines()))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping none of whose keys stands twice: readers disagree on which of the two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)} stands twice")
    return found


class _PlainYaml(yaml.SafeLoader):
    """Refuses aliases, with which a few lines stand for billions, keys that stand twice, and endless nesting."""

    depth = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping none of whose keys stands twice."""
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"the key {twice[0]} stands twice")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Returns the next node, which must not be an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mapping(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a mapping, got {type(found).__name__}{pointer_hint(path)}")
    return found


def _texts(tree: Any) -> list[str]:
    """Every string in nested mappings and lists, keys included."""
    if isinstance(tree, dict):
        return [text for key, value in tree.items() for text in (str(key), *_texts(value))]
    if isinstance(tree, list):
        return [text for value in tree for text in _texts(value)]
    return [tree] if isinstance(tree, str) else []
