"""The folder for hand-over: SAELens' layout, Neuronpedia's scheme of names, a card that says what was measured."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from saejax import interop
from saejax.errors import UserError
from saejax.interop import neuronpedia

HOOK = "blocks.3.hook_resid_post"


@pytest.mark.parametrize("name", ["l1", "topk", "batch_topk", "gated", "matching_pursuit"])
def test_the_folder_is_read_back_and_so_is_the_sae_in_it(name, trained, rows, tmp_path):
    sae = trained(name)
    assert interop.export(sae, tmp_path / "out", "neuronpedia") == tmp_path / "out"
    assert interop.recognise(tmp_path / "out") == "neuronpedia"
    assert interop.recognise(tmp_path / "out" / HOOK) == "saelens"
    for path in (tmp_path / "out", tmp_path / "out" / HOOK):
        np.testing.assert_allclose(interop.load(path)(rows), sae(rows), rtol=1e-5, atol=2e-5)


def test_names_figures_and_card(trained, tmp_path):
    settings = neuronpedia.NeuronpediaConfig(model="gpt2-small", source_set="res-me", repository="me/saes")
    figures = {"fvu": 0.125, "l0": 31.96, "dead_share": 0.01}
    neuronpedia.export(trained("topk"), tmp_path, settings, figures, "On 1,000 rows.")
    assert yaml.safe_load((tmp_path / "pretrained_saes.yaml").read_text()) == {
        "gpt2-small-res-me": {
            "conversion_func": None,
            "model": "gpt2-small",
            "repo_id": "me/saes",
            "saes": [
                {
                    "id": HOOK,
                    "path": HOOK,
                    "neuronpedia": "gpt2-small/3-res-me",
                    "l0": 31.96,
                    "variance_explained": 0.875,
                }
            ],
        }
    }
    metadata = json.loads((tmp_path / HOOK / "cfg.json").read_text())["metadata"]
    assert metadata["neuronpedia_id"] == "gpt2-small/3-res-me" and metadata["model_name"] == "gpt2-small"
    _, front, card = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "saelens"
    assert 'SAE.from_pretrained("me/saes", "blocks.3.hook_resid_post")' in card
    assert "On 1,000 rows." in card and "| fvu | 0.125 |" in card and "| l0 | 31.96 |" in card


def test_nothing_measured_is_said(trained, tmp_path):
    neuronpedia.export(trained("topk"), tmp_path)
    assert "Nothing has been measured" in (tmp_path / "README.md").read_text()
    (release,) = yaml.safe_load((tmp_path / "pretrained_saes.yaml").read_text()).values()
    assert set(release["saes"][0]) == {"id", "path", "neuronpedia"} and release["repo_id"] == "OWNER/NAME"


@pytest.mark.parametrize(
    "hook, d_sae, expected",
    [
        ("blocks.0.hook_mlp_out", 20, "gpt2/0-saejax-mlp-20"),
        ("blocks.11.attn.hook_z", 20, "gpt2/11-saejax-att-20"),
        ("blocks.7.hook_resid_pre", 2048, "gpt2/7-saejax-res-2k"),
        ("blocks.7.ln2.hook_normalized", 20, "gpt2/7-saejax-normalized-20"),
    ],
)
def test_default_names(hook, d_sae, expected, trained):
    sae = trained("topk")
    sae = dataclasses.replace(sae, sparsifier=dataclasses.replace(sae.sparsifier, d_sae=d_sae))
    sae = dataclasses.replace(sae, provenance={"hook": hook, "model": {"name": "hub/owner/gpt2"}})
    assert neuronpedia.names(sae).neuronpedia_id == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hook": "layers.3"}, "must be blocks.<layer>"),
        ({"source_set": "3/res"}, "takes letters, digits"),
        ({"repository": "me"}, "must be owner/name"),
    ],
)
def test_names_that_cannot_be_used(settings, message, trained):
    with pytest.raises(UserError, match=message):
        neuronpedia.names(trained("topk"), neuronpedia.NeuronpediaConfig(**settings))
    nameless = dataclasses.replace(trained("topk"), provenance={"hook": HOOK})
    with pytest.raises(UserError, match="say neuronpedia.model=NAME"):
        neuronpedia.names(nameless)


@pytest.mark.parametrize("text", ["[]", "a: 1", "a: {saes: []}", ": :"])
def test_a_broken_list_of_releases_is_one_line(text, trained, tmp_path):
    neuronpedia.export(trained("topk"), tmp_path)
    (tmp_path / "pretrained_saes.yaml").write_text(text)
    with pytest.raises(
        UserError, match="pretrained_saes.yaml: (no list of releases|lists 0 SAEs|no valid YAML|must hold a mapping)"
    ):
        neuronpedia.load(tmp_path)


@pytest.mark.filterwarnings("default")
def test_saelens_finds_the_entry_and_loads_the_weights(trained, rows, tmp_path, monkeypatch):
    """Where SAELens is beside (see test_peers.py): its own readers of the list and of the folder."""
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory")
    import sae_lens
    import torch

    sae = trained("batch_topk")
    neuronpedia.export(sae, tmp_path, figures={"fvu": 0.25, "l0": 4.0})
    monkeypatch.setattr(directory, "files", lambda package: tmp_path)
    directory.get_pretrained_saes_directory.cache_clear()
    (found,) = directory.get_pretrained_saes_directory().values()
    directory.get_pretrained_saes_directory.cache_clear()
    assert found.saes_map == {HOOK: HOOK} and found.expected_l0 == {HOOK: 4.0}
    assert found.expected_var_explained == {HOOK: 0.75} and found.neuronpedia_id == {HOOK: "tiny/3-saejax-res-20"}
    theirs = sae_lens.SAE.load_from_disk(tmp_path / found.saes_map[HOOK])
    assert theirs.cfg.metadata.neuronpedia_id == "tiny/3-saejax-res-20"
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(rows)).numpy(), sae(rows), rtol=1e-4, atol=1e-4)
