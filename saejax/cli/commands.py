"""Commands on finished runs: evaluate, export, report. Each is a config class and a function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from saejax import config, interop
from saejax.activations import language_model, sinks, store
from saejax.activations.language_model import harvest
from saejax.errors import UserError
from saejax.evals import evaluate as evaluation
from saejax.evals import language_model as splice
from saejax.evals import result as results
from saejax.fields import numeric, paths
from saejax.interop import hub, neuronpedia
from saejax.parallel import processes, sharding
from saejax.report import corpus, dashboards, latents, page, records, sweep
from saejax.runs import agreement, run, run_data
from saejax.sae import model
from saejax.storage import atomic

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate the SAE of a run on held-out rows; writes eval.json into the run directory."""

    run: paths.Local
    """Run directory; with `activations`, also an SAE in any format that is read."""
    activations: paths.Local | None = None
    """Rows [n, d_in] to measure instead of the run's own held-out rows: a .npy or .safetensors file, a directory of
    .npy files, or a store (its held-out part). Nothing is written then. Null takes the run's rows."""
    step: int | None = None
    """Checkpoint; null takes the newest."""
    rows: int | None = None
    """Held-out rows at most; null takes all of them."""
    batch: int = 4096
    """Rows per compiled call, at least 1; no effect on the figures."""
    metrics: tuple[str, ...] = ("default",)
    """Metrics to compute on rows: `default`, and names of others, from outside saejax too."""
    language_model: bool = True
    """Whether to splice the SAE into its language model, if that can be loaded. A model whose files changed since the
    harvest is refused."""
    splice_sequences: int | None = 48
    """Held-out sequences for the splice at most; null takes all of them."""
    splice_batch: int = 4
    """Sequences per compiled call of the splice, at least 1; no effect on the figures."""
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    """Devices that rows and latents are split over, and whose processes they belong to; no effect on the figures."""
    any_data: bool = False
    """Whether to continue with a warning if the data at the run's path differ from its training data; false refuses
    them."""

    def __post_init__(self) -> None:
        numeric.check(self)
        paths.settle(self)
        for name in ("rows", "batch", "splice_sequences", "splice_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # a YAML list arrives as a list
        evaluation.named_metrics(self.metrics)
        _check_step(self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the SAE of a run in another tool's format; scales are folded in, so it works on plain activations."""

    run: paths.Local
    """Run directory, or an SAE in any format that is read."""
    path: paths.Local | None = None
    """Directory to write; null takes export_<format> inside the run directory."""
    format: str = "saelens"
    """Format: saelens, dictionary_learning, sparsify, or another that `saejax.interop` writes. neuronpedia adds a model
    card, names, and dashboards (if the run has text) to saelens."""
    step: int | None = None
    """Checkpoint of a run; null takes the newest."""
    activations: paths.Local | None = None
    """Rows [n, d_in] for a self-check that prints L0 and fvu: a .npy or .safetensors file, a directory of .npy files,
    or a store. Null measures nothing."""
    any_data: bool = False
    """Whether to make dashboards, with a warning, of data that differ from the run's training data; false
    refuses them."""
    hub: str | None = None
    """Hub repository, owner/name, for an upload of the folder without its dashboards; null uploads nothing."""
    hub_private: bool = False
    """Whether a repository that the upload creates is private."""
    neuronpedia: neuronpedia.NeuronpediaConfig = dataclasses.field(default_factory=neuronpedia.NeuronpediaConfig)
    """Names for format=neuronpedia."""
    dashboards: dashboards.DashboardConfig = dataclasses.field(default_factory=dashboards.DashboardConfig)
    """Dashboards for format=neuronpedia."""

    def __post_init__(self) -> None:
        numeric.check(self)
        _check_step(self.step)
        paths.settle(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page: of a run, or of a sweep with a table and a Pareto plot."""

    run: paths.Local | None = None
    """Run directory; give this or sweep."""
    sweep: paths.Local | None = None
    """Directory of a sweep; give this or run."""
    out: paths.Local | None = None
    """File to write; null takes report.html in the run directory, sweep.html in that of a sweep."""
    latents: latents.LatentPage = dataclasses.field(default_factory=latents.LatentPage)
    """How many latents are shown, and how much of each."""
    any_data: bool = False
    """Whether to show latents, with a warning, on data that differ from the run's training data; false refuses them."""

    def __post_init__(self) -> None:
        paths.settle(self)
        if (self.run is None) == (self.sweep is None):
            raise UserError("report needs exactly one of run=RUN_DIR and sweep=SWEEP_DIR")


def _check_step(step: int | None) -> None:
    if step is not None and step < 0:
        raise UserError(f"step must be the number of a checkpoint or null, got {step}")


def evaluate(cfg: EvaluateConfig) -> str:
    """Measure a run and write its eval.json.

    Args:
      cfg: see `EvaluateConfig`.

    Returns:
      The numbers, one on a line.
    """
    run_dir = Path(cfg.run)
    if cfg.activations is not None:
        return _measured(cfg, cfg.activations)
    if not _of_run(run_dir):
        raise UserError(f"run={run_dir}: no run directory; what other tools wrote is measured with activations=ROWS")
    with processes.alike():
        if processes.first() and run_dir.is_dir():
            atomic.check_writable(run_dir)
        sae, trained = run.load(run_dir, cfg.step), config.from_run(run_dir)
    agreement.same_work(trained.source, step=sae.provenance["step"])
    other = run_data.compare(run_dir, trained.source, sae.provenance["step"], any_data=cfg.any_data)
    # The language model runs on the devices of one process.
    with processes.alike():
        heldout = run_data.heldout_store(trained) if cfg.language_model and processes.first() else None
        backend = _backend(heldout) if heldout is not None else None  # first, so that another model is refused at once
    shape = cfg.mesh.shape(jax.device_count())
    mesh = sharding.make_mesh(*shape) if max(shape) > 1 else None
    rows = {"batch_rows": cfg.batch, "max_rows": cfg.rows, "metrics": cfg.metrics}
    result = evaluation.evaluate(sae, trained.source, **rows, mesh=mesh)
    result.data.update({"source": trained.source.fingerprint(), "step": sae.provenance["step"]})
    if other is not None:
        result.data["other_data"] = other
    if heldout is not None and backend is not None:
        result = result.joined(_spliced(sae, backend, heldout, cfg))
    if processes.first():
        results.write_json(result, run_dir / "eval.json")
    lines = [f"  {name:<32} {value:.6g}" for name, value in result.items()]
    return "\n".join([f"held-out metrics of {run_dir}, step {sae.provenance['step']}:", *lines])


def export(cfg: ExportConfig) -> str:
    """Write a run's SAE in another format.

    Args:
      cfg: see `ExportConfig`.

    Returns:
      A line that says where, and one each for what else was written, measured or sent.
    """
    if cfg.hub is not None:
        hub.check(cfg.hub)  # first, for what follows may take long
    path = Path(cfg.path) if cfg.path else Path(cfg.run) / f"export_{cfg.format}"
    if cfg.path is None and Path(cfg.run).is_file():
        raise UserError(f"run={cfg.run}: is a file, and nothing is written into it; say path=DIRECTORY")
    if path.resolve() in (Path(cfg.run).resolve(), Path(cfg.run).resolve().parent) and path.exists():
        raise UserError(f"path={path}: is where the SAE is read from, and stays as it is; give another directory")
    atomic.check_place(path)
    sae = _sae(cfg.run, cfg.step)
    rows = None if cfg.activations is None else run_data.rows(cfg.activations, sae, check=interop.CHECKED_ROWS)
    if cfg.format == neuronpedia.name:
        lines = _handed_over(cfg, sae, path)
    else:
        lines = [f"written: {interop.export(sae, path, cfg.format)}"]
    if rows is not None:
        # What was written is what is measured.
        found = interop.self_check(interop.load(path, cfg.format), rows)
        lines.append(f"on {cfg.activations}: l0 {found['l0']:.4g}, fvu {found['fvu']:.4g}")
    elif not _of_run(Path(cfg.run)):
        lines.append("not measured: activations=ROWS, of the hook that it is for, prints its l0 and fvu")
    if cfg.hub is not None:
        lines.append(f"uploaded: {hub.upload(path, cfg.hub, private=cfg.hub_private)}")
    return "\n".join(lines)


def _handed_over(cfg: ExportConfig, sae: model.SAE, path: Path) -> list[str]:
    """Writes a folder for Neuronpedia; returns what there is to say of it."""
    settings = dataclasses.replace(cfg.neuronpedia, repository=cfg.neuronpedia.repository or cfg.hub)
    of_run = _of_run(Path(cfg.run))
    figures, origin = _figures(Path(cfg.run), sae.provenance["step"]) if of_run else ({}, "")
    lines = [f"written: {neuronpedia.export(sae, path, settings, figures, origin)}"]
    heldout = run_data.text_of(Path(cfg.run), sae.provenance["step"], any_data=cfg.any_data) if of_run else None
    if heldout is None:
        return [*lines, "no dashboards: only a run that was trained on a store has text for them"]
    if sae.sparsifier.sites:
        return [*lines, "no dashboards: they show SAEs that read and write one hook"]
    decode, unembedding = _reading(heldout)
    if decode is None:
        return [*lines, "no dashboards: the tokenizer of the language model cannot be loaded"]
    called, settings = neuronpedia.names(sae, settings), cfg.dashboards
    header = dashboards.Header(
        model_id=called.model,
        layer=called.layer,
        sae_set=called.source_set,
        n_prompts=heldout.n_sequences,
        n_tokens_in_prompt=heldout.manifest["context_length"],
        dataset=str(heldout.manifest["text"]["type"]),
    )
    n, skipped = dashboards.write(
        interop.load(path, neuronpedia.name),  # its latents are those that others will see
        corpus.StoreCorpus(heldout.path),
        decode,
        path / neuronpedia.DASHBOARDS,
        header,
        settings=settings,
        unembedding=unembedding,
    )
    rows = min(heldout.n_rows, settings.max_rows)
    return [*lines, f"dashboards: {n} latents, and {skipped} that are never active in {rows} held-out rows"]


_CARD = ("fvu", "l0", "dead_share", "delta_ce", "recovered_zero", "recovered_mean", "kl")
"""Metrics on a model card, where they were measured."""


def _figures(run_dir: Path, step: int) -> tuple[dict[str, float], str]:
    """Held-out metrics of one checkpoint, and how they were measured; nothing where they are of another one."""
    found = records.read(run_dir)
    data = found.evaluation.get("data", {})
    if data.get("step") == step and "other_data" not in data:
        measured, how = found.evaluation.get("metrics", {}), "by `saejax evaluate`"
    else:
        rows = [row for row in found.rows if row.get("step") == step]
        measured = {key.removeprefix("eval/"): row[key] for row in rows for key in row if key.startswith("eval/")}
        how = "while training"
    figures = {name: float(measured[name]) for name in _CARD if records.is_number(measured.get(name))}
    return figures, f"On held-out rows, {how}, at step {step}. `dead_share` counts latents never active there."


def _of_run(path: Path) -> bool:
    """Whether `run=` means a saejax run; a missing path does, for the message."""
    ours = (path / "config.yaml").is_file() and not interop.circuit_tracer.detect(path)
    return ours or not path.exists()


def _sae(path: str, step: int | None) -> model.SAE:
    return run.load(path, step) if _of_run(Path(path)) else interop.load(path)


def _measured(cfg: EvaluateConfig, activations: str) -> str:
    """The metrics of any SAE on activations that somebody names."""
    sae = _sae(cfg.run, cfg.step)
    settings = {"batch_rows": cfg.batch, "max_rows": cfg.rows, "metrics": cfg.metrics}
    found = evaluation.evaluate(sae, run_data.rows(activations, sae), **settings)
    lines = [f"  {name:<32} {value:.6g}" for name, value in found.items()]
    return "\n".join([f"metrics of {cfg.run} on {activations}:", *lines])


def report(cfg: ReportConfig) -> str:
    """Build the page of a run or of a sweep.

    Args:
      cfg: see `ReportConfig`.

    Returns:
      A line that says where.
    """
    atomic.check_place(Path(str(cfg.out or cfg.run or cfg.sweep)), file=cfg.out is not None)
    if cfg.sweep is not None:
        compared = sweep.read_sweep(cfg.sweep)
        return f"{sweep.text(compared)}\nreport: {sweep.build_sweep(compared, out=cfg.out)}"
    run_dir = Path(str(cfg.run))
    sae, examples = run.load(run_dir), None
    if (heldout := run_data.text_of(run_dir, sae.provenance["step"], any_data=cfg.any_data)) is not None:
        decode, unembedding = _reading(heldout)
        text = corpus.StoreCorpus(heldout.path)
        examples = latents.collect(sae, text, decode, settings=cfg.latents, unembedding=unembedding)
    return f"report: {page.build(run_dir, sae=sae, examples=examples, out=cfg.out)}"


def _spliced(
    sae: model.SAE, backend: language_model.LanguageModel, heldout: store.Reader, cfg: EvaluateConfig
) -> results.EvalResult:
    """Losses of the language model on the held-out text, masked as the harvest masked it."""
    total = min(heldout.n_sequences, cfg.splice_sequences or heldout.n_sequences)
    n_data = backend.mesh.shape[sharding.DATA]
    size = -(-min(cfg.splice_batch, total) // n_data) * n_data
    starts = range(0, total, size)
    batches = (_sequences(heldout, start, min(start + size, total), size) for start in starts)
    sink = sinks.Sink(**heldout.manifest["sink"])
    shown = tqdm(batches, total=len(starts), desc="splice", unit="batch", disable=None)
    rows = (np.asarray(heldout.block(i, cfg.batch), np.float64) for i in range(-(-heldout.n_rows // cfg.batch)))
    mean = np.sum([block.sum(0) for block in rows], axis=0) / heldout.n_rows
    params = jax.device_put(sae.params, sharding.tree_shardings(backend.mesh, sae.params))
    with jax.set_mesh(backend.mesh) if backend.mesh.size > 1 else contextlib.nullcontext():
        return splice.evaluate_language_model(
            dataclasses.replace(sae, params=params),
            backend,
            shown,
            hook=heldout.manifest["hook"],
            keep=functools.partial(sinks.keep_mask, sink=sink),
            mean=mean,
        )


def _sequences(heldout: store.Reader, start: int, stop: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of some sequences, and padding up to `size` of them: one shape for all batches."""
    padding = ((0, size - (stop - start)), (0, 0))
    tokens, segments = heldout.sequences(start, stop)
    return np.pad(tokens, padding), np.pad(segments, padding)


def _reading(heldout: store.Reader) -> tuple[Callable[[Any], str] | None, jax.Array | None]:
    """Token ids to text, and the matrix from activations to logits; None for what there is not."""
    try:
        backend = _backend(heldout)
    except UserError as error:
        logger.warning("without the language model: %s", error)
        backend = None
    unembedding = None
    if backend is not None and heldout.manifest["hook"].split(".")[-1].startswith("hook_resid"):
        unembedding = jax.device_put(backend.unembedding(), jax.local_devices()[0])  # where the SAE is
    return _decoder(backend), unembedding


def _decoder(backend: language_model.LanguageModel | None) -> Callable[[Any], str] | None:
    """Token ids to text, special tokens included: they are tokens that latents fire on."""
    if backend is None or backend.tokenizer is None:
        return None
    return functools.partial(backend.tokenizer.decode, skip_special_tokens=False)


def _backend(heldout: store.Reader) -> language_model.LanguageModel | None:
    """The language model behind a store; None where it cannot be loaded, or runs in PyTorch.

    Raises:
      UserError: it is not the model that was harvested.
    """
    harvested = heldout.manifest["harvest"]
    name = harvested["model"]
    if name.startswith(harvest.TORCH_PREFIX):
        logger.warning("without the language model %s: models that PyTorch runs cannot be spliced", name)
        return None
    try:
        backend = _loaded(name, harvested["model_dtype"])
    except UserError as error:
        logger.warning("without the language model %s: %s", name, error)
        return None
    _check_same_files(name, backend.provenance, heldout.manifest["model"])
    return backend


def _check_same_files(name: str, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuses a model whose files are not those of the harvest; names of files may differ, their content may not."""
    kind = "sha256" if "sha256" in then else "bytes"  # very large models are known by their sizes only
    before, after = then.get(kind), now.get(kind)
    if not isinstance(before, dict) or not isinstance(after, dict):
        return  # the harvest was given a model of its own making
    if sorted(before.values()) == sorted(after.values()):
        return
    file = next((file for file in before if before[file] != after.get(file)), next(iter(after), "?"))
    raise UserError(
        f"model {name} has changed since the harvest: {file} had {kind} {before.get(file, 'none')}, "
        f"has {after.get(file, 'none')}; evaluate with language_model=false leaves it out"
    )


@functools.lru_cache(maxsize=1)
def _loaded(name: str, dtype: str | None) -> language_model.LanguageModel:
    devices = jax.local_devices()
    return language_model.load(name, mesh=sharding.make_mesh(len(devices), devices=devices), dtype=dtype)


NAMES: dict[str, tuple[type, Callable[[Any], str]]] = {
    "evaluate": (EvaluateConfig, evaluate),
    "export": (ExportConfig, export),
    "report": (ReportConfig, report),
}
