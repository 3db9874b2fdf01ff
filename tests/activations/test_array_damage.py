"""Files that are no arrays, or damaged ones: each is one line that names the file, through every door for it."""

import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

import saejax
from saejax import config, interop
from saejax.activations.arrays import Arrays
from saejax.cli import commands
from saejax.errors import UserError
from saejax.sae import model, topk

ROWS = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def npy(array) -> bytes:
    """What np.save writes."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def header(text: str, data: bytes = b"\0" * 960, version: bytes = b"\1\0") -> bytes:
    """A .npy file with a header of one's own."""
    size = len(text).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode("latin1") + data


def described(descr="<f4", order="False", shape="(40, 6)") -> bytes:
    return header(
        f"{{'descr': {descr if descr[0] in '[(' else repr(descr)}, 'fortran_order': {order}, 'shape': {shape}}}\n"
    )


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(ROWS))  # how torch.save lays out a tensor
    return out.getvalue()


def compressed() -> bytes:
    out = io.BytesIO()
    np.savez(out, rows=ROWS)
    return out.getvalue()


DAMAGED_NPY = {
    "empty": (b"", "it is empty"),
    "torch.save": (archive(), "a zip archive, as torch.save"),
    "np.savez": (compressed(), "a zip archive"),
    "pickle": (pickle.dumps(ROWS), "a pickle"),
    "git-lfs": (POINTER, "a git-lfs pointer"),
    "text": (b"1.0 2.0\n3.0 4.0\n", "np.save writes one"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 64, "compressed with gzip"),
    "magic only": (b"\x93NUMPY", "header is damaged"),
    "version": (header("{}", version=b"\x09\0"), "header is damaged"),
    "cut header": (npy(ROWS)[:40], "header is damaged"),
    "no dict": (header("[1, 2]"), "header is damaged"),
    "no syntax": (header("{'descr': '<f4', ((("), "header is damaged"),
    "unclosed": (header("{'descr': '<f4\n"), "header is damaged"),
    "escapes": (header("{'descr': '\\d\\q'}"), "header is damaged"),
    "deep": (header("(" * 900 + ")" * 900), "header is damaged"),
    "long": (header(" " * 20_000 + "{}"), "header is damaged"),
    "no shape": (header("{'descr': '<f4', 'fortran_order': False}"), "header is damaged"),
    "negative": (described(shape="(-40, 6)"), "header is damaged"),
    "both negative": (described(shape="(-40, -6)"), "header is damaged"),
    "bools": (described(shape="(True, 6)"), "header is damaged"),
    "floats": (described(shape="(40.0, 6)"), "header is damaged"),
    "texts": (described(shape="('40', 6)"), "header is damaged"),
    "order": (described(order="7"), "header is damaged"),
    "dtype": (described("<q9"), "header is damaged"),
    "huge": (described(shape="(4000000000000000000, 6000000000000)"), "is cut off"),
    "longer": (described(shape="(41, 6)"), "is cut off"),
    "shorter": (described(shape="(39, 6)"), "24 bytes behind its array"),
    "cut off": (npy(ROWS)[:-1], "is cut off"),
    "two arrays": (npy(ROWS) + npy(ROWS), "several arrays"),
    "objects": (npy(np.array([[1, None]], object)), "holds Python objects"),
    "structured": (npy(np.zeros(4, [("a", "<f4"), ("b", "<f4")])), "real numbers are needed"),
    "subarray": (described("('<f4', (3,))", shape="(40, 2)"), "header is damaged|real numbers|holds|cut off"),
    "void": (npy(np.zeros((4, 3), "V4")), "real numbers are needed"),
    "nothing": (described("<U0"), "real numbers are needed"),
    "complex": (npy(np.ones((4, 3), complex)), "dtype complex128, but real numbers"),
    "bool": (npy(np.ones((4, 3), bool)), "dtype bool, but real numbers"),
    "dates": (npy(np.zeros((4, 3), "M8[s]")), "real numbers are needed"),
    "one number": (npy(np.float32(3)), "a single number"),
    "one axis": (npy(np.ones(12, np.float32)), r"reshape it to \[n, d_in\], say array.reshape\(-1, d_in\)"),
    "three axes": (npy(np.ones((4, 5, 6), np.float32)), r"reshape it to \[n, d_in\], say array.reshape\(-1, 6\)"),
    "no rows": (npy(np.ones((0, 6), np.float32)), "holds no number"),
    "no columns": (npy(np.ones((6, 0), np.float32)), "holds no number"),
    "nan": (npy(np.where(np.arange(40)[:, None] == 39, np.nan, ROWS)), "row 39 holds NaN or an infinity"),
    "infinite": (npy(np.where(np.arange(40)[:, None] == 38, -np.inf, ROWS)), "row 38 holds NaN or an infinity"),
    "beyond float32": (npy(np.full((40, 6), 1e200)), "holds 1e.200, and float32 ends at 3.40282e.38; scale"),
    "below float32": (npy(np.full((40, 6), 1e-200)), "nothing above 1e-200, which float32 rounds to 0; scale"),
}
"""What lies in a file called .npy, and what is said of it."""


def tensors(header: object, data: bytes = b"\0" * 960) -> bytes:
    """A .safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(40, 6), offsets=(0, 960)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED_SAFETENSORS = {
    "empty": (b"", "it is empty"),
    "git-lfs": (POINTER, "a git-lfs pointer"),
    "zip": (archive(), "a zip archive"),
    "pickle": (pickle.dumps(ROWS), "a pickle"),
    "npy": (npy(ROWS), "a .npy file"),
    "text": (b"hello, this is no tensor file", "not a .safetensors file"),
    "short": (b"\x05\0", "not a .safetensors file"),
    "long header": ((2**63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808 bytes"),
    "no json": (tensors(b"{{{"), "its header is not JSON"),
    "no utf-8": (tensors(b"\xff\xfe{}"), "its header is not JSON"),
    "deep": (tensors(b"[" * 100_000), "its header is not JSON"),
    "list": (tensors([1, 2]), "its header is not a JSON object"),
    "null": (tensors(None), "its header is not a JSON object"),
    "twice": (tensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), "its header is not JSON"),
    "no tensor": (tensors({}), "holds no tensor"),
    "metadata only": (tensors({"__metadata__": {"a": "b"}}), "holds no tensor"),
    "entry": (tensors({"a": [1]}), "tensor a is not a JSON object"),
    "no dtype": (tensors({"a": {"shape": [40, 6], "data_offsets": [0, 960]}}), "dtype, shape and two data_offsets"),
    "dtype": (tensors({"a": entry(dtype=3)}), "dtype, shape and two data_offsets"),
    "unknown dtype": (tensors({"a": entry(dtype="F33")}), "dtype F33"),
    "other dtype": (tensors({"a": entry(dtype="I32")}), "dtype I32"),
    "shape": (tensors({"a": entry(shape="40")}), "dtype, shape and two data_offsets"),
    "negative shape": (tensors({"a": entry(shape=[-40, -6])}), "dtype, shape and two data_offsets"),
    "float shape": (tensors({"a": entry(shape=[40.0, 6])}), "dtype, shape and two data_offsets"),
    "bool shape": (tensors({"a": entry(shape=[True, 6], offsets=[0, 24])}), "dtype, shape and two data_offsets"),
    "huge shape": (tensors({"a": entry(shape=[2**62, 2**62])}), "says F32"),
    "wrapped shape": (tensors({"a": entry(shape=[2**62, 4], offsets=[0, 0])}), "says F32"),
    "offsets": (tensors({"a": entry(offsets=[0])}), "dtype, shape and two data_offsets"),
    "text offsets": (tensors({"a": entry(offsets=["0", "960"])}), "dtype, shape and two data_offsets"),
    "no offsets": (tensors({"a": entry(offsets=None)}), "dtype, shape and two data_offsets"),
    "negative": (tensors({"a": entry(offsets=[-960, 0])}), "dtype, shape and two data_offsets"),
    "backwards": (tensors({"a": entry(offsets=[960, 0])}), "is cut off"),
    "beyond": (tensors({"a": entry(offsets=[1, 961])}), "is cut off"),
    "far beyond": (tensors({"a": entry(offsets=[2**62, 2**62 + 960])}), "is cut off"),
    "cut off": (tensors({"a": entry()})[:-1], "is cut off"),
    "short tensor": (tensors({"a": entry(shape=[40, 5])}), "says F32"),
    "overlap": (tensors({"a": entry(), "b": entry(shape=[1], offsets=[956, 960])}), "tensors a and b overlap"),
    "another is bad": (tensors({"a": entry(), "b": entry(offsets=[-4, 0])}), "tensor b"),
    "three axes": (tensors({"a": entry(shape=[4, 10, 6])}), r"reshape it to \[n, d_in\]"),
    "nan": (tensors({"a": entry()}, np.full(240, np.nan, "<f4").tobytes()), "holds NaN or an infinity"),
}
"""What lies in a file called .safetensors, and what is said of it."""

DOORS = ["source", "heldout", "train", "evaluate", "export", "python"]
"""Through which a user names a file; see `doors`."""


def through_doors(cases: dict, prefix: str = "") -> list:
    """(door, *case): all cases through the first two doors; one in seven through the rest, which compile, and all of
    them in the long suite."""
    found = []
    for number, (name, case) in enumerate(cases.items()):
        for door in DOORS:
            quick = door in DOORS[:2] or number % 7 == 0
            found.append(
                pytest.param(door, *case, id=f"{prefix}{name}-{door}", marks=() if quick else pytest.mark.nightly)
            )
    return found


FILES = through_doors({name: ("rows.npy", *case) for name, case in DAMAGED_NPY.items()}, "npy ")
FILES += through_doors({name: ("rows.safetensors", *c) for name, c in DAMAGED_SAFETENSORS.items()}, "safetensors ")


def sae(d_in: int = 6) -> model.SAE:
    import jax

    sparsifier = topk.TopK(d_in=d_in, d_sae=8, k=2)
    return model.SAE(sparsifier, sparsifier.init(jax.random.key(0)), {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An SAE of rows of width 6 in a foreign format."""
    return interop.export(sae(), tmp_path_factory.mktemp("sae") / "out")


def doors(path: str, exported) -> dict:
    """Every way in which a user names a file of rows, and the key that it is named by."""
    named = {"run": str(exported), "activations": path}
    return {
        "source": (lambda: every_row(Arrays(path=path)), "source.path"),
        "heldout": (lambda: list(Arrays(path=path).heldout(16)), "source.path"),
        "train": (lambda: composed(path), "source.path"),
        "evaluate": (lambda: commands.evaluate(commands.EvaluateConfig(**named)), "activations"),
        "export": (lambda: commands.export(commands.ExportConfig(path=f"{path}.out", **named)), "activations"),
        "python": (lambda: saejax.evaluate(sae(), path), "activations"),
    }  # fmt: skip


def every_row(source: Arrays) -> None:
    stream = source.open(n_lanes=1, block_rows=1, lanes=range(1), seed=0, prefetch=0)
    assert stream.n_rows is not None
    for number in range(stream.n_rows):
        stream.record(number)
    list(source.heldout(16))


def composed(path: str) -> None:
    """As `saejax train` comes to its config, which asks the source for its width; and then its first rows."""
    cfg = config.load("train", config.Config, ["source=arrays", f"source.path='{path}'", "sae.d_sae=8", "sae.k=2"])
    every_row(cfg.source)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("door", "name", "content", "said"), FILES)
def test_what_is_no_array_is_one_line_that_names_it(door, name, content, said, tmp_path, exported):
    (tmp_path / name).write_bytes(content)
    use, key = doors(str(tmp_path / name), exported)[door]
    with pytest.raises(UserError, match=said) as caught:
        use()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000 and str(tmp_path / name) in line
    assert line.startswith((f"{key} = ", "source.tensor = ")) and (key == "source.path" or "source." not in line)
    assert not any(word in line for word in ("allow_pickle", "pickle.load", "KeyError", "interpolation", "Traceback"))
    assert not os.path.exists(f"{tmp_path / name}.out")  # rows that cannot be read are refused before the work


FOLDERS = {
    "missing": ({}, "no .npy or .safetensors file"),
    "empty": ({"folder/": b""}, "no .npy or .safetensors file"),
    "other files": ({"folder/a.txt": b"x"}, "no .npy or .safetensors file"),
    "safetensors": ({"folder/a.safetensors": tensors({"a": entry()})}, "a.safetensors is read by its own name"),
    "hidden": ({"folder/.a.npy": npy(ROWS)}, "no .npy or .safetensors file"),
    "widths": ({"folder/a.npy": npy(ROWS), "folder/b.npy": npy(ROWS[:, :5])}, "b.npy: width 5, but .*a.npy has 6"),
    "one is bad": ({"folder/a.npy": npy(ROWS), "folder/b.npy": POINTER}, "b.npy: not a .* a git-lfs pointer"),
    "deep and bad": ({"folder/a.npy": npy(ROWS), "folder/c/b.npy": b""}, "c/b.npy: not a readable .npy file"),
}


@pytest.mark.parametrize(("door", "files", "said"), through_doors(FOLDERS))
def test_folders_that_hold_no_table_are_one_line(door, files, said, tmp_path, exported):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
    use, key = doors(str(tmp_path / "folder"), exported)[door]
    with pytest.raises(UserError, match=said) as caught:
        use()
    assert str(caught.value).startswith(f"{key} = ") and "\n" not in str(caught.value)


LAYOUTS = {
    "fortran": np.asfortranarray(ROWS),
    "big-endian": ROWS.astype(">f4"),
    "big-endian fortran": np.asfortranarray(ROWS.astype(">f4")),
    "double": ROWS.astype(np.float64),
    "big-endian double": ROWS.astype(">f8"),
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_the_same_rows_in_any_layout_are_the_same_data(rows, tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", rows)
    a, b = (Arrays(path=str(tmp_path / f"{name}.npy"), heldout_share=0.5) for name in "ab")
    np.testing.assert_array_equal(np.concatenate(list(b.heldout(7))), ROWS[20:])
    assert a.identity() == b.identity()


def test_half_floats_of_the_other_byte_order_stay_half_floats(tmp_path):
    np.save(tmp_path / "a.npy", ROWS.astype(">f2"))
    (rows,) = Arrays(path=str(tmp_path / "a.npy"), heldout_share=0.5).heldout(40)
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, ROWS[20:].astype(np.float16))


def test_a_version_2_header_is_read(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, ROWS, version=(2, 0))
    assert Arrays(path=str(tmp_path / "a.npy")).d_in == 6


def test_folders_are_entered_also_by_links_and_each_file_once(tmp_path, caplog):
    """Order of the names, at all depths; what links lead to again would lie in training and held-out rows at once."""
    parts = dict(zip(["a.npy", "b/1.npy", "b/2.npy", "c.npy", "x/1.npy"], np.split(ROWS, 5), strict=True))
    root, elsewhere = tmp_path / "rows", tmp_path / "elsewhere"
    for name, part in parts.items():
        file = elsewhere / name[2:] if name.startswith("x/") else root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, part)
    (root / "x").symlink_to(elsewhere)
    (root / "y").symlink_to(elsewhere)
    (root / "b" / "up").symlink_to(root)
    (root / "d.npy").symlink_to(root / "c.npy")
    source = Arrays(path=str(root), heldout_share=0.5)
    np.testing.assert_array_equal(source._table()[0:40], ROWS)
    assert caplog.text.count("was read already") == 3  # y, up and d.npy
    (root / "e.npy").symlink_to(tmp_path / "nowhere.npy")
    with pytest.raises(UserError, match="e.npy: a link that leads nowhere"):
        _ = source.d_in


def test_rows_that_may_be_columns_are_asked_about(tmp_path, exported, caplog):
    np.save(tmp_path / "a.npy", ROWS.T)
    path = str(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"6 training rows: .*; they are 6 rows of width 40: .* transposed\?"):
        Arrays(path=path, heldout_share=0).open(n_lanes=4, block_rows=4, lanes=range(4), seed=0)
    Arrays(path=path, heldout_share=0).open(n_lanes=1, block_rows=1, lanes=range(1), seed=0)
    assert "transposed?" in caplog.text
    for use in (
        lambda: commands.evaluate(commands.EvaluateConfig(run=str(exported), activations=path)),
        lambda: saejax.evaluate(sae(), path),
        lambda: saejax.evaluate(sae(), ROWS.T),
    ):
        with pytest.raises(UserError, match=r"transposed\?"):
            use()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("kind", ["array", "cube", "blocks"])
def test_arrays_in_python_are_looked_at_too(bad, kind):
    rows = ROWS.astype(np.float64)
    rows[33, 2] = bad
    given = {"array": rows, "cube": rows.reshape(4, 10, 6), "blocks": iter(np.split(rows, 4))}[kind]
    said = r"1e\+200, and float32 ends" if bad == 1e200 else "NaN or an infinity"
    with pytest.raises(UserError, match=f"activations: row 33 holds {said}"):
        saejax.evaluate(sae(), given)


@pytest.mark.parametrize(
    "given",
    [5, None, {"a": ROWS}, np.float32(3), np.array([["a"] * 6]), np.ones((4, 6), complex), [np.ones((4, 6), object)]],
    ids=repr,
)
def test_what_is_no_array_in_python_is_one_line(given):
    with pytest.raises(UserError, match="activations must be") as caught:
        saejax.evaluate(sae(), given)
    assert "\n" not in str(caught.value)


def test_every_dtype_that_holds_numbers_is_evaluated():
    wanted = saejax.evaluate(sae(), np.round(ROWS * 4))
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16, np.int8, ">f4"):
        assert saejax.evaluate(sae(), np.round(ROWS * 4).astype(dtype))["fvu"] == pytest.approx(wanted["fvu"], rel=1e-6)


def test_a_store_that_cannot_be_measured_is_named_by_its_key(tmp_path, exported, small_store):
    (tmp_path / "half" / "train").mkdir(parents=True)
    (tmp_path / "half" / "train" / "manifest.json").write_text("{}")
    for path, said in (
        (tmp_path / "half", "lacks the heldout/ part"),
        (small_store / "train", "a part of a store; give"),
    ):
        with pytest.raises(UserError, match=f"activations = {path}: .*{said}"):
            commands.evaluate(commands.EvaluateConfig(run=str(exported), activations=str(path)))
