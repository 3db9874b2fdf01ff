"""What is made for others names no folder of the machine that made it."""

import numpy as np
import pytest

from saejax import cli, config, interop
from saejax.fields import paths
from saejax.runs import run

ARGUMENTS = [
    "sae.d_sae=32",
    "sae.k=2",
    "train.n_tokens=2560",
    "train.batch=256",
    "buffer.rows=512",
    "train.eval_rows=64",
]
WRITTEN = sorted(name for name, module in interop.FORMATS.items() if module.export is not None)


@pytest.fixture(scope="module", params=["store", pytest.param("arrays", marks=pytest.mark.nightly)])
def trained(request, small_store, tmp_path_factory):
    """A run in a folder of its own, evaluated, on data whose paths are absolute."""
    folder = tmp_path_factory.mktemp("a private place")
    data = small_store
    if request.param == "arrays":
        data = folder / "rows.npy"
        np.save(data, np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32))
    words = [f"source={request.param}", f"source.path={data}", "mesh=single", *ARGUMENTS]
    run_dir = folder / "sweep" / "run"
    run.train(config.load("train", config.Config, words), run_dir)
    assert cli.main(["evaluate", f"run={run_dir}", "splice_sequences=2"]) == 0
    return run_dir


def naming(folder, private) -> list[str]:
    """The files that name a private folder, in any encoding that text has in them."""
    needles = [str(private).encode(), str(private).replace("/", "\\/").encode(), str(private).encode("utf-16-le")]
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [str(file.relative_to(folder.parent)) for file in files if any(n in file.read_bytes() for n in needles)]


@pytest.mark.parametrize("format", WRITTEN)
def test_an_export_names_no_folder_of_this_machine(format, trained, tmp_path, tmp_path_factory):
    named = ["neuronpedia.model=tiny", "neuronpedia.hook=blocks.1.hook_resid_post"] * (format == "neuronpedia")
    words = [f"run={trained}", f"format={format}", f"path={tmp_path / 'out'}", *named, "dashboards.max_rows=500"]
    assert cli.main(["export", *words]) == 0
    private = tmp_path_factory.getbasetemp()
    assert naming(tmp_path / "out", private) == []
    assert cli.main(["export", f"run={tmp_path / 'out'}", f"path={tmp_path / 'again'}"]) == 0  # what was read from it
    assert naming(tmp_path / "again", private) == []


@pytest.mark.parametrize("words", [["run={run}", "latents.n_latents=4"], ["sweep={run.parent}"]], ids=["run", "sweep"])
def test_a_page_names_no_folder_of_this_machine(words, trained, tmp_path, tmp_path_factory):
    out = tmp_path / "page.html"
    assert cli.main(["report", *(word.format(run=trained) for word in words), f"out={out}"]) == 0
    assert naming(out, tmp_path_factory.getbasetemp()) == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/data/st", "st"), ("/data/st/", "st"), ("/st", "st"), ("/", "/"), ("~/st", "st"),
        ("torch:/models/llama", "torch:llama"),
        ("C:\\data\\st", "st"), ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post"), ("owner/name", "owner/name"),
        ("torch:owner/name", "torch:owner/name"), ("a, b", "a, b"), (3, 3), (None, None),
    ],
)  # fmt: skip
def test_what_is_left_of_a_path(text, shown):
    assert paths.unplaced({"x": [text]}) == {"x": [shown]}
