"""Neuronpedia release folder: what SAELens loads from a hub and what Neuronpedia asks of a release.

    <folder>/README.md               model card, with the figures that were measured
    <folder>/pretrained_saes.yaml    the entry for SAELens' list of releases, which Neuronpedia's tools read
    <folder>/<sae_id>/               cfg.json and sae_weights.safetensors, as `saelens` writes them
    <folder>/dashboards/             batch-N.json, written by `saejax export` where a run has text

Sources:
  SAELens 6.54, `pretrained_saes.yaml` and its README of a release; Neuronpedia's instructions for dashboards of one's
  own, and its scheme of names: <model>/<layer>-<source set>.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import folder, saelens, saelens_config, strict
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "neuronpedia"
CARD, STANZA, DASHBOARDS = "README.md", "pretrained_saes.yaml", "dashboards"
NO_REPOSITORY = "OWNER/NAME"

_SHORT = {"hook_resid_pre": "res", "hook_resid_mid": "res", "hook_resid_post": "res", "hook_mlp_out": "mlp",
          "hook_attn_out": "att", "hook_z": "att"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronpediaConfig:
    """Names under which an SAE is handed over; null takes what the run says."""

    model: str | None = None
    """Name of the model there, as TransformerLens calls it (gpt2-small); null takes the last part of the run's."""
    hook: str | None = None
    """Hook as TransformerLens calls it, blocks.<layer>.<...>; null takes the run's."""
    source_set: str | None = None
    """Name of the set of SAEs, without the layer: letters, digits, - and _; null is like saejax-res-16k."""
    repository: str | None = None
    """Hub repository that will hold the folder, owner/name; null takes that of hub=, or leaves a gap to fill."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Everything that the files call the SAE."""

    model: str
    """Neuronpedia's name of the model."""
    hook: str
    """Hook; also the SAE's own folder."""
    layer: int
    """Layer of the hook."""
    source_set: str
    """Name of the set of SAEs."""
    repository: str
    """Hub repository."""

    @property
    def neuronpedia_id(self) -> str:
        """<model>/<layer>-<source set>."""
        return f"{self.model}/{self.layer}-{self.source_set}"

    @property
    def release(self) -> str:
        """Name of the release in SAELens' list."""
        return f"{self.model}-{self.source_set}"


def names(sae: SAE, settings: NeuronpediaConfig | None = None) -> Names:
    """Returns what an SAE will be called.

    Raises:
      UserError: model or hook are not known, or a name cannot be used.
    """
    settings, known = settings or NeuronpediaConfig(), saelens_config.written(sae, "", False, {})["metadata"]
    model = settings.model or re.split(r"[/\\:]", str(known.get("model_name") or ""))[-1]
    if not model:
        raise UserError("format=neuronpedia: this SAE does not know its model; say neuronpedia.model=NAME")
    if not re.fullmatch(r"[\w.-]+", model):
        raise UserError(f"neuronpedia.model={strict.one_line(model)}: takes letters, digits, ., - and _")
    hook = settings.hook or str(known.get("hook_name") or "")
    found = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook)
    if found is None:
        raise UserError(f"format=neuronpedia: hook {hook!r} must be blocks.<layer>.<...>; say neuronpedia.hook=NAME")
    last, width = found[2].split(".")[-1], sae.sparsifier.d_sae
    short = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    source_set = settings.source_set or f"saejax-{_SHORT.get(last, last.removeprefix('hook_'))}-{short}"
    if not re.fullmatch(r"[\w-]+", source_set):
        raise UserError(f"neuronpedia.source_set={source_set}: takes letters, digits, - and _")
    repository = settings.repository or NO_REPOSITORY
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"neuronpedia.repository={repository}: must be owner/name")
    return Names(model=model, hook=hook, layer=int(found[1]), source_set=source_set, repository=repository)


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a folder that `export` wrote."""
    return (path / STANZA).is_file() and (path / CARD).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads the one SAE of such a folder.

    Raises:
      UserError: the folder lists no SAE or several, or the SAE is wrong.
    """
    path = paths.local(path, "path")
    releases = strict.read_yaml(json_yaml.inside(path, STANZA))
    try:
        folders = [pathlib.PurePosixPath(entry["path"]) for release in releases.values() for entry in release["saes"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / STANZA}: no list of releases ({type(error).__name__})") from None
    if len(folders) != 1:
        raise UserError(f"{path / STANZA}: lists {len(folders)} SAEs; load one of its folders by itself")
    if folders[0].is_absolute() or ".." in folders[0].parts or not str(folders[0]).isprintable():
        raise UserError(f"{path / STANZA}: path must be a folder in this one, got {folders[0]}")
    return saelens.load(json_yaml.inside(path, str(folders[0])))


def export(
    sae: SAE,
    path: str | os.PathLike,
    settings: NeuronpediaConfig | None = None,
    figures: Mapping[str, float] | None = None,
    origin: str = "",
) -> pathlib.Path:
    """Writes weights, model card and SAELens' entry.

    Args:
      sae: Of any architecture that the saelens format takes.
      path: Directory; made where missing.
      settings: Names; None takes those that the SAE knows.
      figures: Held-out metrics of this very SAE by name (fvu, l0, ...), for the card and the entry.
      origin: Where the figures are from, a sentence.

    Returns:
      The directory.

    Raises:
      UserError: the format cannot hold the architecture, or a name is missing.
    """
    path, called, figures = paths.local(path, "path"), names(sae, settings), dict(figures or {})
    entry: dict[str, Any] = {"id": called.hook, "path": called.hook, "neuronpedia": called.neuronpedia_id}
    entry |= {"l0": round(figures["l0"], 4)} if "l0" in figures else {}
    entry |= {"variance_explained": round(1 - figures["fvu"], 4)} if "fvu" in figures else {}
    release = {"conversion_func": None, "model": called.model, "repo_id": called.repository, "saes": [entry]}
    replaced = (
        CARD,
        STANZA,
        f"{DASHBOARDS}/",
        *(f"{called.hook}/{file}" for file in (saelens.CONFIG, saelens.WEIGHTS)),
    )
    with folder.filled(path, replaced) as part:
        own = saelens.export(sae, part / called.hook)
        config = strict.read_json(own / saelens.CONFIG)
        config["metadata"] |= {
            "model_name": called.model,
            "hook_name": called.hook,
            "neuronpedia_id": called.neuronpedia_id,
        }
        (own / saelens.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / STANZA).write_text(yaml.safe_dump({called.release: release}, sort_keys=False), encoding="utf-8")
        (part / CARD).write_text(_card(called, config, figures, origin), encoding="utf-8")
    return path


def _card(called: Names, config: dict[str, Any], figures: Mapping[str, float], origin: str) -> str:
    facts = {
        "model": called.model,
        "hook": called.hook,
        "architecture": f"{config['architecture']} (trained as {config['metadata']['training_architecture']})",
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "context size": config["metadata"].get("context_size"),
        "Neuronpedia": called.neuronpedia_id,
    }
    lines = [
        "---", "library_name: saelens", "tags: [sparse-autoencoder, saejax]", "---", "",
        f"# Sparse autoencoder of {called.model}, {called.hook}", "",
        "Trained with saejax, saved for [SAELens](https://github.com/decoderesearch/SAELens).", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items() if value is not None), "",
        "```python", "from sae_lens import SAE", "",
        f'sae = SAE.from_pretrained("{called.repository}", "{called.hook}")', "```", "",
        "The SAE takes activations as they are and gives them back in that scale; decoder rows have norm 1 wherever "
        "that changes no selection.", "",
        "## Measured", "",
    ]  # fmt: skip
    if not figures:
        return "\n".join([*lines, "Nothing has been measured on held-out data yet.", ""])
    lines += [origin, ""] * bool(origin)
    return "\n".join(
        [*lines, "| metric | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in figures.items()), ""]
    )
