"""Files made to harm: they may change nothing outside themselves, reach no other folder, and take no memory."""

import struct
import tracemalloc
import warnings
import zipfile
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from saejax import interop
from saejax.errors import UserError
from saejax.interop import neuronpedia, strict, torch_file

LITTLE = 2**25
"""Bytes that no file of this page may ask for."""


def pt(path, pickled, how=zipfile.ZIP_STORED, storage=b""):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled, how)
        archive.writestr("x/data/0", storage)
    return path


def refused(read, file, message):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            read(file)
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_a_pickle_changes_no_type_of_this_process(tmp_path):
    before = np.dtype(ml_dtypes.bfloat16).str
    state = b"(K\x03X\x01\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
    refused(torch_file.read, pt(tmp_path / "x.pt", b"\x80\x02ctorch\nBFloat16Storage\n" + state + b"b."), "damaged")
    assert np.dtype(ml_dtypes.bfloat16).str == before


def test_a_pickle_hangs_nothing_on_our_functions(tmp_path):
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb."
    refused(torch_file.read, pt(tmp_path / "x.pt", pickled), "damaged")
    assert not torch_file._tensor.__dict__


def test_attributes_of_a_dictionary_do_not_replace_its_methods(tmp_path):
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb."
    assert torch_file.read_state_dict(pt(tmp_path / "x.pt", pickled)) == {}


@pytest.mark.parametrize("number", [b"r\xff\xff\xff\x00", b"p16777215\n"])
def test_a_pickle_reserves_no_memory(number, tmp_path):
    refused(
        torch_file.read, pt(tmp_path / "x.pt", b"\x80\x02}" + number + b"."), "damaged .*it numbers 16777215 things"
    )


def test_a_pickle_with_an_odd_escape_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch_file.read(pt(tmp_path / "x.pt", b"\x80\x02S'\\!'\n.")) == "\\!"


def test_a_pickle_is_not_compressed(tmp_path):
    many = b"\x80\x02(" + b"N" * 10_000_000 + b"t."
    refused(torch_file.read, pt(tmp_path / "x.pt", many, zipfile.ZIP_DEFLATED), "data.pkl is compressed")
    assert torch_file.keys(tmp_path / "x.pt") == frozenset()


def test_many_tensors_of_one_storage_take_its_memory_once(tmp_path):
    size = struct.pack("<i", 2**20)
    place = b"((X\x07\0\0\0storagectorch\nByteStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuJ" + size + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + place + b"K\0J" + size + b"\x85K\x01\x85\x89)tR"
    file = pt(tmp_path / "x.pt", b"\x80\x02](" + tensor * 1000 + b"e.", storage=b"\0" * 2**20)
    tracemalloc.start()
    found = torch_file.read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [array.shape for array in found] == [(2**20,)] * 1000
    assert peak < LITTLE


def npz(path, header, data=b"", how=zipfile.ZIP_STORED):
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data)
    return path


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize("shape", ["(1000000000,)", "(10, -1)", "(2**9,)", "(10" + 30 * "0" + ",)"])
def test_shapes_of_an_npz_are_not_believed(shape, tmp_path):
    refused(strict.read_npz, npz(tmp_path / "x.npz", FLOATS % shape, b"\0" * 40), "no .npz file of plain arrays")


def test_an_npz_does_not_expand_without_end(tmp_path):
    zeros = npz(tmp_path / "x.npz", FLOATS % "(10000000,)", b"\0" * 40_000_000, zipfile.ZIP_DEFLATED)
    refused(strict.read_npz, zeros, "it would expand to 400001")


def test_npz_files_of_numpy_are_read(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 3), ">f4")), "c": np.float16(2)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = strict.read_npz(tmp_path / "x.npz")
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefghi")),
        "a: &a {b: 1}\nc: {<<: *a}",
        "activation: !!python/object/apply:os.getcwd []",
        "a: " + "[" * 3000,
        "? [a]\n: 1",
        "a: 0x" + "f" * 5000,
    ],
)
def test_yaml_says_no_more_than_json(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    refused(strict.read_yaml, tmp_path / "config.yaml", "config.yaml: no valid YAML")


def test_json_nests_only_so_far(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    refused(strict.read_json, tmp_path / "config.json", "config.json: no valid JSON")


@pytest.mark.parametrize("folder", ["../secret", "{absolute}", "a/../../secret", '"a\\0b"'])
def test_a_list_of_releases_leads_nowhere_else(folder, trained, tmp_path):
    secret = interop.export(trained("topk"), tmp_path / "secret")
    given = neuronpedia.export(trained("topk"), tmp_path / "given")
    file = given / neuronpedia.STANZA
    file.write_text(
        file.read_text().replace("path: blocks.3.hook_resid_post", f"path: {folder.format(absolute=secret)}")
    )
    with pytest.raises(UserError, match="path must be a folder in this one, got"):
        interop.load(given)


def test_a_listed_folder_is_no_link_out_of_its_own(trained, tmp_path):
    given = neuronpedia.export(trained("topk"), tmp_path / "given")
    (given / "blocks.3.hook_resid_post").rename(tmp_path / "secret")
    (given / "blocks.3.hook_resid_post").symlink_to("../secret")
    with pytest.raises(UserError, match="leads out of its folder"):
        interop.load(given)


def test_what_the_system_refuses_is_one_line(trained, tmp_path):
    given = neuronpedia.export(trained("topk"), tmp_path / "given")
    file = given / neuronpedia.STANZA
    file.write_text(file.read_text().replace("path: blocks.3.hook_resid_post", f"path: {'x' * 300}"))
    with pytest.raises(UserError, match="File name too long"):
        interop.load(given)
    config = interop.export(trained("topk"), tmp_path / "x") / "cfg.json"
    config.unlink()
    config.mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        interop.load(tmp_path / "x", "saelens")


def test_messages_that_quote_a_file_stay_on_one_line(trained, tmp_path):
    file = interop.export(trained("topk"), tmp_path / "x") / "cfg.json"
    file.write_text(file.read_text().replace('"d_in"', r'"a\n\u001b[2J"'))
    with pytest.raises(UserError, match=r"unknown a  \[2J"):
        interop.load(tmp_path / "x")


def test_what_overflows_in_folding_is_refused(tmp_path):
    import published_examples

    path, _ = published_examples.llama_scope(tmp_path, dataset_average_activation_norm={"in": 1e-30, "out": 1e30})
    with pytest.raises(UserError, match="must be finite in float32 in the scale of the data"):
        interop.load(path)
