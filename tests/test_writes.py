"""No file is written through what another planted under a name that can be foreseen.

Every writer is tried: those of the package are found in its sources, so that a new one has to be added here or to go
through `saejax.storage.atomic`, `saejax.storage.lock` or the private folder of an export.
"""

import ast
import logging
import os
import pathlib
import secrets
import stat

import numpy as np
import pytest

import saejax
from saejax.activations.store import files as store_format
from saejax.activations.store import writer as store_writer
from saejax.errors import UserError
from saejax.interop import folder
from saejax.lab.experiments import figures
from saejax.report import dashboards
from saejax.storage import atomic, lock, tracking

SOURCES = sorted(pathlib.Path(saejax.__file__).parent.rglob("*.py"))
OWN_WAY = {
    "storage/atomic.py": "is that way",
    "storage/lock.py": "opens without following, looks at what it has opened",
    "interop/torch_file.py": "writes where interop/folder.py says",
}
WRITES = {"write_text", "write_bytes", "tofile", "save_file", "symlink_to", "NamedTemporaryFile"}
WRITES |= {"mkstemp", "copy", "copy2", "copyfile", "copytree", "move", "open_memmap"}
INTO_OPENED = {"save", "savez", "savez_compressed", "savetxt", "savefig"}  # of numpy and matplotlib: into a file object
MODES = {"w", "wb", "w+", "wb+", "w+b", "a", "ab", "a+", "x", "xb", "r+", "r+b", "rb+"}


def writers(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of calls that write to a name."""
    handlers = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.endswith("FileHandler")
    ]
    found = [(node.lineno, ast.unparse(node)) for node in handlers]  # also one that is derived from
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [*node.args, *(key.value for key in node.keywords)]
        mode = any(isinstance(arg, ast.Constant) and arg.value in MODES for arg in given)
        module = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        library = name not in ("copy", "copy2", "move") or module == "shutil"
        into_name = name in INTO_OPENED and module in ("np", "numpy", "figure", "plt") and not (
            node.args and ast.unparse(node.args[0]) in ("file", "out")
        )  # fmt: skip
        opens = name in ("open", "fdopen", "ZipFile", "GzipFile", "memmap") and mode
        flags = module == "os" and name == "open" and "O_CREAT" in ast.unparse(node)
        if name in WRITES and library and not (name == "open_memmap" and not mode) or into_name or opens or flags:
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_every_writer_of_the_package_is_known():
    root, found = SOURCES[0].parent, []
    for path in SOURCES:
        where = path.relative_to(root).as_posix()
        if where in OWN_WAY:
            continue
        for line, text in writers(ast.parse(path.read_text())):
            private = where.startswith("interop/") and ("part /" in text or "own /" in text)  # of folder.filled
            found += [] if private else [f"{where}:{line}: {text}"]
    assert not found, "\n".join(["write through saejax.storage.atomic:", *found])


@pytest.mark.parametrize(
    "line",
    [
        "open(p, 'w')", "p.open('wb')", "p.open(mode='a')", "p.write_text(x)", "p.write_bytes(x)", "np.savez(p, a=1)",
        "np.save(folder / 'a.npy', x)", "x.tofile(p)", "safetensors.numpy.save_file(w, p)", "shutil.copy(a, b)",
        "logging.FileHandler(p)", "figure.savefig(p)", "np.memmap(p, mode='w+')", "os.open(p, os.O_CREAT)",
        "zipfile.ZipFile(p, 'w')", "class Log(logging.FileHandler): ...", "np.lib.format.open_memmap(p, mode='w+')",
    ],
)  # fmt: skip
def test_the_search_sees(line):
    assert writers(ast.parse(line))
    assert not writers(ast.parse("open(p); p.open('rb'); np.save(file, x); tree.copy(); np.memmap(p, mode='r')"))


class Experiment:
    def savefig(self, file, **_):
        file.write(b"figure")


def _shard(target: pathlib.Path) -> None:
    facts = {"hook": "h", "dtype": "float32", "d_in": 2, "context_length": 2, "shard_sequences": 1, "n_shards": 1}
    shard = store_writer.ShardWriter(target.parent, 0, facts)
    with shard:
        one = {"rows": np.ones((1, 2), np.float32), "index": np.zeros((1, 4)), "tokens": np.ones((1, 2, 2), np.int32)}
        shard.append(**one, segment_documents=[[0]], masked={})


def _log(target: pathlib.Path) -> None:
    handler = atomic.LogFile(target)
    try:
        handler.emit(logging.makeLogRecord({"msg": "said"}))
    finally:
        handler.close()


def _metrics(target: pathlib.Path) -> None:
    tracker = tracking.Tracker(target.parent, tracking.TrackerConfig(), {})
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()


def _opened(target: pathlib.Path) -> None:
    with atomic.opened(target) as file:
        np.savez(file, a=np.ones(2))


def _export(target: pathlib.Path) -> None:
    with folder.filled(target.parent, {target.name}) as part:
        (part / target.name).write_text("{}")


DOORS = {
    "text": ("eval.json", lambda target: atomic.write(target, "{}")),
    "bytes": ("a.bin", lambda target: atomic.write(target, b"{}")),
    "parts": ("step_1.npz", _opened),
    "json of a store": ("manifest.json", lambda target: store_format.write_json(target, {"a": 1})),
    "shard": ("shard-00000.rows", _shard),
    "figure": ("figure.png", lambda target: figures.save(Experiment(), target.with_suffix(""))),
    "dashboard": ("batch-0.json", lambda target: dashboards._dump(target, {})),
    "export": ("cfg.json", _export),
    "metrics": ("metrics.jsonl", _metrics),
    "log": ("train.log", _log),
    "lock": (".lock", lambda target: lock.hold(target.parent).release()),
}
REFUSES = {"log", "lock"}  # what is appended to, or held, is not replaced


@pytest.fixture(params=DOORS)
def door(request):
    name, write = DOORS[request.param]
    return request.param, name, write


@pytest.mark.parametrize("points_to", ["file", "nothing"])
def test_a_link_at_the_name_itself_is_replaced_or_refused(door, points_to, tmp_path):
    kind, name, write = door
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    if points_to == "file":
        mine.write_text("precious")
    (out / name).symlink_to(mine)
    if kind in REFUSES or (kind, points_to) == ("metrics", "nothing"):
        with pytest.raises(UserError, match=f"{name} is a link"):
            write(out / name)
        assert (out / name).is_symlink()
    else:
        write(out / name)
        assert stat.S_ISREG((out / name).lstat().st_mode)
    assert mine.read_text() == "precious" if points_to == "file" else not mine.exists()


def test_a_link_at_every_name_that_was_foreseeable_is_left_alone(door, tmp_path):
    kind, name, write = door
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    mine.write_text("precious")
    pid = os.getpid()
    if kind != "export":  # which refuses a folder with anything else in it
        for planted in (f".{name}.{pid}.partial", f"{name}.partial-{pid}", f"{name}.partial", "images.partial"):
            (out / planted).symlink_to(mine)
    write(out / name)
    assert mine.read_text() == "precious"


def test_even_a_name_that_was_guessed_is_not_written_through(door, tmp_path, monkeypatch):
    kind, name, write = door
    if kind in REFUSES | {"export", "metrics"}:
        pytest.skip("has no unfinished file of its own")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    mine.write_text("precious")
    (out / f".{name}.{'0' * 16}.partial").symlink_to(mine)
    with pytest.raises(FileExistsError):
        write(out / name)
    assert mine.read_text() == "precious" and (out / f".{name}.{'0' * 16}.partial").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_what_the_umask_leaves(door, umask, tmp_path):
    kind, name, write = door
    if kind == "lock":
        pytest.skip("is gone by then; see test_lock.py")
    before = os.umask(umask)
    try:
        write(tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
