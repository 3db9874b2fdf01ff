"""Frozen behaviour: what a change of structure must leave as it is, measured through the public doors.

`python tests/frozen.py` writes tests/fixtures/frozen/*.json anew; a commit that does so names what changed and why.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything imports JAX, as in conftest.py
    os.environ.update(NPROC="16", JAX_PLATFORMS="cpu", WANDB_MODE="offline", HF_HUB_OFFLINE="1")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import cli, config
from saejax.parallel import sharding
from saejax.runs import run

FIXTURES = Path(__file__).parent / "fixtures" / "frozen"

ARCHITECTURES = (
    "abs_topk", "batch_topk", "gated", "jumprelu", "l1", "l1_plain",
    "matching_pursuit", "matryoshka", "p_anneal", "topk",
)  # fmt: skip
"""Files of conf/sae."""
DTYPES = ("float32", "bfloat16")
MESHES = ((1, 1), (4, 1), (2, 2))
"""Devices along data and latent."""
VARIANTS = {
    "topk aux_k": ["sae=topk", "train.dead_after_tokens=32", "sae.k_aux=4"],
    "topk ema resample skip": ["train.ema_decay=0.9", "train.resample_every_steps=5", "train.on_nonfinite=skip"],
    "jumprelu mlp": ["sae=jumprelu", "sae.encoder=mlp"],
    "topk lista": ["sae.encoder=lista"],
    "topk tied": ["sae.encoder=tied"],
    "topk transcoder skip": ["source.sites=[8,8]", "sae.family=transcoder", "sae.skip=true"],
    "l1 crosscoder": ["sae=l1", "source.sites=[8,8]", "sae.family=crosscoder", "sae.unit_decoder=false"],
    "topk clt": ["source.sites=[4,4,4,4]", "sae.family=clt"],
    "gated sign layer_norm": ["sae=gated", "optim=sign", "normalize=layer_norm"],
    "topk muon whiten": ["optim=muon", "normalize=whiten"],
    "batch_topk schedule_free": ["sae=batch_topk", "optim=schedule_free"],
}
"""What else changes a step, one device, float32."""
SIZES = [
    "source.d_in=16", "source.n_features=64", "sae.d_sae=64", "train.batch=32", "buffer.rows=64", "train.n_tokens=640",
    "train.eval_rows=64", "source.heldout_rows=64", "normalize.rows=64", "train.dead_after_tokens=64",
]  # fmt: skip
N_STEPS = 20


def cases() -> Iterable[tuple[str, list[str]]]:
    """(name, overrides) of every step that is frozen."""
    for architecture, dtype, (n_data, n_latent) in itertools.product(ARCHITECTURES, DTYPES, MESHES):
        name = f"{architecture} {dtype} {n_data}x{n_latent}"
        mesh = [f"mesh.data={n_data}", f"mesh.latent={n_latent}"]
        yield name, [f"sae={architecture}", *_small(architecture), f"sae.matmul_dtype={dtype}", *mesh]
    for name, overrides in VARIANTS.items():
        architecture = name.split()[0]
        yield name, [*_small(architecture), "mesh.data=1", "mesh.latent=1", *overrides]


def _small(architecture: str) -> list[str]:
    ranked = ("topk", "batch_topk", "abs_topk", "matryoshka", "matching_pursuit")
    return ["sae.k=4"] if architecture in ranked else []


def made(overrides: list[str]) -> config.Config:
    """The config of a case."""
    return config.load("train", config.Config, [*SIZES, *overrides])


def lowered(cfg: config.Config) -> str:
    """StableHLO of the training step, symbols numbered in their order and locations stripped."""
    mesh = sharding.make_mesh(*cfg.mesh.shape(jax.device_count(), n_lanes=cfg.train.n_lanes))
    learner = run.learner(cfg)
    rows = run.filling(cfg, np.empty(0, np.float32))
    wanted = learner.abstract(rows, mesh)
    lanes = NamedSharding(mesh, P(sharding.DATA))
    record = jax.ShapeDtypeStruct((rows.shape[0], *rows.shape[2:]), np.float32, sharding=lanes)
    with jax.set_mesh(mesh):
        return canonical(jax.jit(learner.step, donate_argnums=0).lower(wanted, record).as_text())


def canonical(text: str) -> str:
    """A module without what names alone decide: symbols, result names, locations."""
    text = re.sub(r' ?loc\(.*?\)$|^#loc.*$|jax\.result_info = "[^"]*",? ?', "", text, flags=re.MULTILINE)
    numbers: dict[str, str] = {}
    return re.sub(r"@[\w.]+", lambda symbol: numbers.setdefault(symbol[0], f"@{len(numbers)}"), text)


def trained(cfg: config.Config, run_dir: Path) -> dict[str, list[float]]:
    """Leaf -> norm and a fixed projection of it, of the parameters after `N_STEPS` steps."""
    assert cfg.train.n_steps == N_STEPS
    run.train(cfg, run_dir)
    params = run.load(run_dir).params
    found = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        values = np.asarray(leaf, np.float64)
        direction = np.random.default_rng(0).normal(size=values.shape)
        found[jax.tree_util.keystr(path)] = [float(np.linalg.norm(values)), float(np.sum(values * direction))]
    return found


def files_of_run(run_dir: Path) -> dict[str, Any]:
    """Keys of what a run leaves behind."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": sorted(str(p.relative_to(run_dir)) for p in run_dir.iterdir()),
        "config.yaml": re.findall(r"^ *[\w-]+:", (run_dir / "config.yaml").read_text(), re.MULTILINE),
        "run.json": list(json.loads((run_dir / "run.json").read_text())),
        "metrics.jsonl": sorted({key for line in lines for key in line}),
    }


def exports(run_dir: Path, out: Path) -> dict[str, str]:
    """Format and file -> sha256, of an SAE whose parameters are made of whole numbers, so on any machine."""
    import dataclasses

    import saejax
    from saejax.sae import model

    trained = saejax.load(run_dir)
    whole = jax.tree.map(
        lambda a: np.arange(a.size, dtype=np.float32).reshape(a.shape) % 7 - 3, dataclasses.asdict(trained.params)
    )
    params = dataclasses.replace(trained.params, **whole)
    sae = model.SAE(trained.sparsifier, params, {"run": "runs/x", "step": 1})
    found = {}
    for name in ("saelens", "dictionary_learning", "sparsify"):
        folder = Path(saejax.export(sae, out / name, format=name))
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            found[f"{name}/{file.relative_to(folder)}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def help_texts(capture: Any) -> dict[str, str]:
    """Command -> what --help prints; `capture` calls a function and returns its output."""
    commands = [[], *([name] for name in cli.COMMANDS)]
    return {" ".join(["saejax", *c]): capture(lambda c=c: cli.main([*c, "--help"])) for c in commands}


def write(name: str, value: object) -> None:
    """One fixture."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    (FIXTURES / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


def read(name: str) -> Any:
    """One fixture."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def _printed(call: Any) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return out.getvalue()


def main() -> None:
    """Write every fixture."""
    import tempfile

    texts = {name: lowered(made(overrides)) for name, overrides in cases()}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    write("steps", {"jax": jax.__version__, "sha256": hashes})
    if len(sys.argv) > 1:  # where a hash has changed: the texts, to be compared
        for name, text in texts.items():
            (Path(sys.argv[1]) / name.replace(" ", "_")).write_text(text)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write("parameters", {name: trained(made(o), root / name.replace(" ", "_")) for name, o in cases()})
        run_dir = root / "topk_float32_1x1"
        write("files", files_of_run(run_dir))
        write("exports", exports(run_dir, root / "out"))
    write("help", help_texts(_printed))


if __name__ == "__main__":
    main()
