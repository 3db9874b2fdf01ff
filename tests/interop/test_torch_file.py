"""Files of torch.save are read without torch, and nothing in them is run."""

import io
import pickle
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.interop import torch_file

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "double": np.array([1e300, -0.5]),
    "k": np.asarray(7, np.int32),
    "sizes": np.array([1, 2, 2**40]),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


def archive(path, pickled, files=(), compression=zipfile.ZIP_STORED, root="archive"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", pickled)
        for name, content in files:
            file.writestr(f"{root}/{name}", content)
    return path


def same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        np.testing.assert_array_equal(found[key], value)


def test_what_is_written_is_read(tmp_path):
    torch_file.write_state_dict(tmp_path / "x.pt", TENSORS)
    same(torch_file.read_state_dict(tmp_path / "x.pt"), TENSORS)


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    torch_file.write_state_dict(tmp_path / "x.pt", TENSORS)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["half"].dtype == torch.bfloat16 and found["k"].dtype == torch.int32
    same({k: v.numpy() for k, v in found.items() if k != "half"}, {k: v for k, v in TENSORS.items() if k != "half"})
    np.testing.assert_array_equal(found["half"].float().numpy(), TENSORS["half"].astype(np.float32))


def test_what_torch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 4)
    state = module.state_dict()
    whole = torch.arange(24.0).reshape(4, 6)
    state |= {"view": whole.T[1:3], "shared": whole[1], "half": torch.ones(2, dtype=torch.float16)}
    torch.save(state, tmp_path / "x.pt")
    same(torch_file.read_state_dict(tmp_path / "x.pt"), {key: value.numpy() for key, value in state.items()})
    torch.save({"w": module.weight, "nested": [1, "a", (None, True)]}, tmp_path / "x.pt")
    found = torch_file.read(tmp_path / "x.pt")
    np.testing.assert_array_equal(found["w"], module.weight.detach().numpy())
    assert found["nested"] == [1, "a", (None, True)]
    with pytest.raises(UserError, match="nested must be a tensor, got list"):
        torch_file.read_state_dict(tmp_path / "x.pt")


class Opens:
    """An object whose pickle calls a function of its choice when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Opens(open, "SENTINEL", "w"), r"io\.open;"),
        (Opens(eval, "1 + 1"), r"\.eval;"),
        (Opens(getattr, "x", "upper"), r"\.getattr;"),
        ({"a": np.ones(2)}, "numpy"),
        (pickle.Pickler, r"pickle\.Pickler;"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_else_is_called(value, named, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = archive(tmp_path / "x.pt", pickle.dumps(value, protocol=protocol))
    with pytest.raises(UserError, match=f"wants to call .*{named}") as caught:
        torch_file.read(file)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_dotted_names_do_not_lead_elsewhere(tmp_path):
    pickled = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."
    with pytest.raises(UserError, match="wants to call collections.OrderedDict.__init__"):
        torch_file.read(archive(tmp_path / "x.pt", pickled))


def test_legacy_files_are_refused_with_advice(tmp_path):
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO(b""))
    for name in ("pickle.pt", "tar.pt"):
        with pytest.raises(UserError, match="no zip archive.*save it again"):
            torch_file.read(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        torch_file.read(tmp_path / "none.pt")


def tampered(tmp_path, replace, by, storage=None):
    """A file of one float32 tensor [2, 3], with some of the pickle's bytes replaced."""
    torch_file.write_state_dict(tmp_path / "good.pt", {"w": np.ones((2, 3), np.float32)})
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        pickled, data = file.read("archive/data.pkl"), file.read("archive/data/0")
    assert replace in pickled
    changed = pickled.replace(replace, by, 1)
    return archive(tmp_path / "bad.pt", changed, [("data/0", data if storage is None else storage)])


SHAPE = b"(J\x02\0\0\0J\x03\0\0\0t"


@pytest.mark.parametrize(
    ("replace", "by", "storage", "message"),
    [
        (SHAPE, b"(J\x02\0\0\0J\x04\0\0\0t", None, "outside its 6 elements"),
        (SHAPE, b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft", None, "outside its 6 elements"),
        (SHAPE, b"(J\x02\0\0\0J\xfd\xff\xff\xfft", None, "outside its 6 elements"),
        (b"(J\x03\0\0\0J\x01\0\0\0t", b"(J\x06\0\0\0J\x01\0\0\0t", None, "outside its 6 elements"),
        (b"J\0\0\0\0(", b"J\x04\0\0\0(", None, "outside its 6 elements"),
        (b"J\0\0\0\0(", b"J\xff\xff\xff\xff(", None, "outside its 6 elements"),
        (b"storage", b"sturage", None, "a reference of kind 'sturage'"),
        (b"w", b"w", b"\0" * 20, "20 bytes, not 6 x 4"),
        (b"u.", b"u", None, "damaged"),
        (b"}(", b"}", None, "damaged"),
    ],
)
def test_broken_files_are_refused(replace, by, storage, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        torch_file.read(tampered(tmp_path, replace, by, storage))
    assert "\n" not in str(caught.value)


def test_compressed_archives_are_refused(tmp_path):
    torch_file.write_state_dict(tmp_path / "good.pt", {"w": np.zeros(10_000, np.float32)})
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        parts = [("data/0", file.read("archive/data/0"))]
        packed = archive(tmp_path / "x.pt", file.read("archive/data.pkl"), parts, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        torch_file.read(packed)
