"""Configurations and inputs that cannot be: each ends in one clear line and status 2, and leaves no file behind."""

import json
import pathlib
import pickle
import shutil
import zlib

import numpy as np
import pytest
import safetensors.numpy
from test_store_source import write

SMALL = ["train.batch=64", "train.n_tokens=640", "buffer.rows=64", "sae.d_sae=32", "sae.k=4", "mesh=single"]
ARRAYS = ["train", "source=arrays", *SMALL]
STORE = ["train", "source=store", "source.verify=start", *SMALL, "train.batch=8", "train.n_lanes=1", "buffer.rows=8"]

COMMAND_LINES = [
    ("trian", "unknown command trian; there are harvest, train"),
    ("train sae.kk=1", "unknown key sae.kk; did you mean sae.k?"),
    ("train sae=topkk", "sae=topkk: no such choice; choose one of abs_topk"),
    ("train source=nowhere", "source=nowhere: no such choice"),
    ("train sae.k", "sae.k: expected key=value"),
    ("train sae.k=[1", "sae.k=[1: the value cannot be read"),
    ("train sae.k=abc", "sae.k"),
    ("train sae.k=4.5", "sae.k"),
    ("train sae.k=0", "sae.k must be"),
    ("train sae.k=-3", "sae.k must be"),
    ("train sae.d_sae=64 sae.k=65", "sae.k must be"),
    ("train sae.d_sae=0", "d_sae"),
    ("train sae.d_in=7", "sae.d_in must equal the width of the source, 64, got 7"),
    ("train sae.family=nonsense", "sae.family"),
    ("train sae.family=transcoder", "sites"),
    ("train sae.matmul_dtype=int3", "matmul_dtype"),
    ("train seed=x", "seed"),
    ("train +extra=1", "extra"),
    ("train sae=jumprelu sae.bandwidth=0", "bandwidth"),
    ("train sae=l1 sae.l1_coef=-1", "l1_coef"),
    ("train train.batch=0", "train.batch must be at least 1, got 0"),
    ("train train.batch=100", "train.batch must be a multiple of train.n_lanes=8, got 100"),
    ("train train.n_tokens=10", "train.n_tokens must be at least train.batch=512, got 10"),
    ("train train.n_lanes=0", "train.n_lanes must be at least 1, got 0"),
    ("train train.on_nonfinite=maybe", "train.on_nonfinite"),
    ("train train.max_skipped_steps=0", "train.max_skipped_steps must be at least 1, got 0"),
    ("train train.ema_decay=1.5", "train.ema_decay must be in (0, 1) or null, got 1.5"),
    ("train train.firing_rate=0.1", "train.firing_rate needs train.b_enc_init=firing_rate"),
    ("train train.dead_after_tokens=0", "train.dead_after_tokens must be in [1, "),
    ("train train.eval_every_steps=0", "train.eval_every_steps must be at least 1 or null, got 0"),
    ("train mesh.data=3", "mesh.data must divide train.n_lanes=8, got 3"),
    ("train mesh.latent=3", "mesh.latent must divide sae.d_sae="),
    ("train mesh.latent=64", "needs 64 devices"),
    ("train mesh.data=0", "mesh.data must be at least 1, got 0"),
    ("train buffer.rows=1", "buffer.rows = 1: at least the batch of 512 rows is needed"),
    ("train optim.lr=-1", "optim.lr"),
    ("train optim.lr=fast", "optim.lr"),
    ("train optim.name=adamx", "optim.name"),
    ("train checkpoint.keep_last=0", "checkpoint.keep_last must be at least 1, got 0"),
    ("train checkpoint.keep_best=-1", "checkpoint.keep_best must be at least 0, got -1"),
    ("train checkpoint.save_every_steps=0", "checkpoint.save_every_steps must be at least 1 or null, got 0"),
    ("train tracker.mode=sometimes", "tracker.mode"),
    ("train normalize.mode=loud", "normalize.mode"),
    ("train source.n_features=0", "source.n_features"),
    ("train source.firing_rate=2", "source.firing_rate"),
    ("train source.noise=-1", "source.noise"),
    ("train source=store", "source.path must be given"),
    ("train source=store source.path=/nowhere", "source.path = /nowhere: no train/ store in it"),
    ("train source=store source.path={store} source.verify=later", "source.verify"),
    ("train source=store source.path={store} source.verify=never source.skip_damaged=true", "source.skip_damaged=true"),
    ("train resume=/nowhere", "/nowhere is not a run directory"),
    ("train resume={empty}", "is not a run directory"),
    ("train resume={broken_config}", "config.yaml"),
    ("train resume={unknown_type}", "config.yaml"),
    ("train resume={empty} -m", "resume=RUN_DIR takes key=value overrides only, got -m"),
    ("train hydra.run.dir=/proc/none", "/proc/none"),
    ("train -m sae.k=2,x", "sae.k"),
    ("harvest path={new} context_length=1", "context_length must be at least 2"),
    ("harvest path={new} shard_sequences=5", "shard_sequences must be a multiple of batch_sequences=8, got 5"),
    ("harvest path={new} n_tokens=0", "n_tokens must be positive, got 0"),
    ("harvest path={new} sink_factor=0.5", "sink_factor must be above 1 or null, got 0.5"),
    ("harvest path={new} process=0", "process and n_processes must be given together"),
    ("harvest path={new} dtype=int8", "dtype"),
    ("harvest path={new} on_nonfinite=hide", "on_nonfinite"),
    ("harvest path={new} model=/nowhere", "/nowhere"),
    ("harvest path={new} model={empty} text=pydoc", "{empty}"),
    ("harvest path={new} text=files text.path=/nowhere/*.txt model={small_model}", "/nowhere"),
    ("harvest path={new} model={small_model} text=pydoc hook=blocks.99.hook_resid_post", "blocks.99"),
    (
        "harvest path={new} model={small_model} text=pydoc hook=blocks.0.hook_resid_post context_length=64 bos=nope",
        "bos must be auto, none or a token",
    ),
    (
        "harvest path={garbage} model={small_model} text=pydoc hook=blocks.0.hook_resid_post context_length=64",
        "{garbage}",
    ),
    ("evaluate", "run must be given"),
    ("evaluate run=/nowhere", "/nowhere is not a run directory"),
    ("evaluate run=/nowhere batch=0", "batch must be at least 1, got 0"),
    ("evaluate run={empty} activations={rows}", "{empty}"),
    ("evaluate run={pickled} activations={rows}", "{pickled}"),
    ("evaluate run={foreign} activations={rows}", "foreign"),
    ("export run=/nowhere", "/nowhere is not a run directory"),
    ("export run={foreign} path={new}", "foreign"),
    ("report", "report needs exactly one of run=RUN_DIR and sweep=SWEEP_DIR"),
    ("report run=a sweep=b", "report needs exactly one of"),
    ("report run=/nowhere", "/nowhere is not a run directory"),
    ("report sweep=/nowhere", "/nowhere"),
    ("report sweep={empty}", "{empty}"),
    ("store verify /nowhere", "/nowhere is not an activation store"),
    ("store info {empty}", "is not an activation store"),
    ("store info {other_version}", "format_version must be 1, got 7"),
    ("store info {other_format}", "format must be 'saejax-activations', got 'else'"),
    ("store info {no_json}", "is damaged: not a JSON object"),
    ("store frobnicate {empty}", ""),
]
"""What is typed, and what the line says."""

INPUTS = {
    "missing.npy": (ARRAYS, "no .npy or .safetensors file"),
    "strings.npy": (ARRAYS, "dtype <U3, but real numbers are needed"),
    "objects.npy": (ARRAYS, "not a readable .npy file"),
    "flat.npy": (ARRAYS, "rows [n, d_in] are needed"),
    "empty.npy": (ARRAYS, "rows [n, d_in] are needed"),
    "text.npy": (ARRAYS, "not a readable .npy file"),
    "cut.npy": (ARRAYS, "cut.npy"),
    "few.npy": (ARRAYS, "training rows: a step takes 64"),
    "nan.npy": (ARRAYS, "holds NaN or an infinity; clean the array first"),
    "noise.safetensors": (ARRAYS, "not a .safetensors file"),
    "two.safetensors": (ARRAYS, "source.tensor = not given"),
    "cut.safetensors": (ARRAYS, "is cut off"),
    "words.txt": (ARRAYS, ".npy or .safetensors is needed"),
    "flipped_store": (STORE, "shard-00001.rows: the checksum is not that of the harvest"),
    "cut_store": (STORE, "shard-00000.rows has 127 bytes, expected 128 bytes"),
    "holed_store": (STORE, "shard-00002.rows is missing"),
    "empty_store": (STORE, "no train/ store in it"),
    "flipped_manifest": (STORE, "manifest.json is damaged"),
}
"""Data that `train` is pointed at, and what it says."""


OF_COMMANDS, OF_INPUTS = 3, 4
"""One in so many is in the quick part: each takes half a second."""


def case(name: str, *more: str):
    """A parameter of a test, of the long suite for what takes long and is like others."""
    quick = zlib.crc32(name.encode()) % (OF_COMMANDS if more else OF_INPUTS) == 0
    return pytest.param(name, *more, id=name, marks=() if quick else pytest.mark.faults)


@pytest.fixture(scope="module")
def places(tmp_path_factory, small_model) -> dict[str, pathlib.Path]:
    """Files and directories that are wrong, each in its own way."""
    root = tmp_path_factory.mktemp("wrong")
    here = {"small_model": small_model, "new": root / "new"}

    def add(name: str, content: bytes | str | None = None) -> pathlib.Path:
        here[name.split(".")[0] if name.endswith(".yaml") else name] = path = root / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 8)).astype(np.float32)
    for name, array in {
        "strings": np.array([["abc"]]), "objects": np.array([[{}]]), "flat": rows[0], "empty": rows[:0],
        "few": rows[:20], "nan": np.where(np.arange(400)[:, None] % 8 == 3, np.nan, rows), "rows": rows,
    }.items():  # fmt: skip
        np.save(root / f"{name}.npy", array, allow_pickle=True)
    here["rows"] = root / "rows.npy"
    add("text.npy", "not an array")
    add("cut.npy", (root / "rows.npy").read_bytes()[:-100])
    add("words.txt", "words")
    add("noise.safetensors", rng.bytes(64))
    safetensors.numpy.save_file({"a": rows, "b": rows}, root / "two.safetensors")
    safetensors.numpy.save_file({"a": rows}, root / "one.safetensors")
    add("cut.safetensors", (root / "one.safetensors").read_bytes()[:-1])
    add("garbage", b"a file where a directory is wanted")
    add("pickled", pickle.dumps({"W_dec": [1.0]}))
    add("empty")
    add("foreign")
    (root / "foreign" / "cfg.json").write_text('{"architecture": "topk", "d_in": 8, "d_sae": "many"}')
    safetensors.numpy.save_file({"W_enc": rows}, root / "foreign" / "sae_weights.safetensors")
    for name, text in {"broken_config": "sae: [", "unknown_type": "sae: {type: deep, d_in: 3}\n"}.items():
        (add(name) / "config.yaml").write_text(text)
    for name in ("store", "flipped_store", "cut_store", "holed_store", "flipped_manifest"):
        write(add(name) / "train", 0)
        write(root / name / "heldout", 100)
    shutil.copytree(root / "store" / "train", add("other_version") / "train")
    shutil.copytree(root / "store" / "train", add("other_format") / "train")
    shutil.copytree(root / "store" / "train", add("no_json") / "train")
    flipped = root / "flipped_store" / "train" / "shard-00001.rows"
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    cut = root / "cut_store" / "train" / "shard-00000.rows"
    cut.write_bytes(cut.read_bytes()[:-1])
    (root / "holed_store" / "train" / "shard-00002.rows").unlink()
    add("empty_store")
    for name, change in {
        "other_version": {"format_version": 7}, "other_format": {"format": "else"}, "flipped_manifest": {"rows": 47},
    }.items():  # fmt: skip
        file = root / name / "train" / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (root / "no_json" / "train" / "manifest.json").write_bytes(b"\xff[")
    return here | {"root": root}


@pytest.fixture
def ended(places, forker):
    """(status, lines that were printed, files that are new) of a command line."""
    root = places["root"]

    def run(arguments: list[str]):
        there = {path for path in root.rglob("*") if path.is_file()}
        status = forker.run("command", argv=arguments, folder=str(root))
        said = forker.said().replace("\r", "\n").strip().splitlines()
        new = {path for path in root.rglob("*") if path.is_file()} - there
        shutil.rmtree(root / "new", ignore_errors=True)
        shutil.rmtree(root / "runs", ignore_errors=True)
        return status, [line for line in said if line.strip()], new

    return run


@pytest.mark.parametrize(("typed", "message"), [case(*line) for line in COMMAND_LINES])
def test_a_command_line_that_cannot_be(ended, places, typed, message):
    status, said, new = ended(typed.format(**places).split())
    assert status == 2
    if message:
        assert message.format(**places) in said[-1] and said[-1].startswith("saejax"), said
    left = {path.name for path in new if not path.name.endswith(".lock")}  # locks stay where they are
    assert not any("Traceback" in line for line in said) and left <= {"train.log"}


@pytest.mark.parametrize("name", [case(name) for name in INPUTS])
def test_data_that_cannot_be(ended, places, name):
    arguments, message = INPUTS[name]
    status, said, new = ended([*arguments, f"source.path={places['root'] / name}", "hydra.run.dir=runs/x"])
    assert status == 2 and message in said[-1] and said[-1].startswith("saejax train: "), said
    assert not any("Traceback" in line for line in said)
    assert {path.name for path in new} <= {"train.log"}


def test_there_are_enough_of_them():
    assert len(COMMAND_LINES) + len(INPUTS) >= 60
