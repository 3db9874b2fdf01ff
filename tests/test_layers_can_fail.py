"""The checks of test_layers.py, on small snippets: each finds what it is for, and nothing else."""

import ast

import pytest
from test_layers import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    circles,
    doc_findings,
    documented_methods,
    door_findings,
    import_graph,
    layer_findings,
    name_findings,
    place_findings,
    signature_findings,
    size_findings,
)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("saejax.sae.topk", "from saejax.training import step"),
        ("saejax.sae.topk", "import saejax.evals.metric"),
        ("saejax.sae.topk", "def f():\n    from saejax.parallel import sharding"),
        ("saejax.kernels.top_k", "from saejax.sae.base import Encoding"),
        ("saejax.training.loop", "from saejax import cli"),
        ("saejax.evals.metric", "import importlib\nx = importlib.import_module('saejax.report.page')"),
        ("saejax.sae.model", "from .base import Encoding"),
        ("saejax.misplaced", "import jax"),
        ("saejax.activations.loader", "from saejax.activations.store import reader"),
        ("saejax.sae.topk", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from saejax import config"),
    ],
)
def test_finds_a_forbidden_import(module, source):
    assert len(layer_findings(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("saejax.sae.topk", "from saejax.errors import UserError\nfrom saejax.kernels import top_k"),
        ("saejax.training.loop", "from saejax.sae import base\nimport jax"),
        ("saejax.cli.program", "from saejax.report import page"),
        ("saejax.activations.store.reader", "from saejax.activations import packing"),
        ("saejax.sae.topk", "from saejax import __version__"),
    ],
)
def test_accepts_an_allowed_import(module, source):
    assert layer_findings(module, ast.parse(source)) == []


@pytest.mark.parametrize(
    ("module", "source", "n_findings"),
    [
        ("saejax.training.loop", "def f():\n    import wandb", 1),
        ("saejax.sae.model", "from orbax import checkpoint\nimport orbax.checkpoint.v1", 2),
        ("saejax.storage.tracking", "import wandb", 0),
        ("saejax.interop.saelens", "from safetensors.numpy import load_file", 0),
        ("saejax.tracking_extra", "import wandb", 1),
    ],
)
def test_one_door_per_library(module, source, n_findings):
    assert len(door_findings(module, ast.parse(source))) == n_findings


def test_finds_circles_also_of_types_alone():
    here, there = "from saejax.sae import b", "if TYPE_CHECKING:\n    from saejax.sae import a"
    sources = [("saejax.sae.a", ast.parse(here)), ("saejax.sae.b", ast.parse(there)), ("saejax.sae.c", ast.parse(here))]
    assert circles(import_graph(sources)) == [["saejax.sae.a", "saejax.sae.b"]]
    assert circles(import_graph(sources[1:])) == []


def test_sizes():
    body = "    x = 1\n"
    assert size_findings("f.py", "def f():\n" + body * (MAX_FUNCTION_LINES - 1)) == []
    assert len(size_findings("f.py", "def f():\n" + body * MAX_FUNCTION_LINES)) == 1
    assert size_findings("f.py", "x = 1\n" * MAX_FILE_LINES) == []
    assert len(size_findings("f.py", "x = 1\n" * (MAX_FILE_LINES + 1))) == 1


@pytest.mark.parametrize("where", ["saejax/utils.py", "saejax/common/x.py", "saejax/sae/_helpers.py"])
def test_vague_names(where):
    assert len(name_findings(where)) == 1


DOCUMENTED = '''"""A module."""
from dataclasses import dataclass
from typing import ClassVar
class Base:
    """A base."""
    def f(self):
        """Does f."""
class Final(Base):
    """An override need not repeat the contract of its base."""
    def f(self): pass
    def _private(self): pass
@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""
    name: ClassVar[str] = "config"
    k: int = 3
    """Active latents, at least 1."""
'''


def findings(source: str) -> list[str]:
    tree = ast.parse(source)
    return doc_findings("f.py", tree, documented_methods([tree]))


def test_documentation():
    assert findings(DOCUMENTED) == []
    for removed in [
        '"""A module."""',
        '"""Does f."""',
        '"""A config."""',
        '"""Active latents, at least 1."""',
    ]:
        assert findings(DOCUMENTED.replace(removed, "pass")), removed


@pytest.mark.parametrize(
    "line",
    ["path = '/" + "root/x'", "see /" + "work/main", "/" + "home/ann/y", "https://pypi" + ".org/simple"],
)
def test_private_places(line):
    assert len(place_findings("f.md", line)) == 1


@pytest.mark.parametrize("line", ["docs/works/x", "/tmp/x", "~/home/x", "the root/ folder", "https://github.com/a/b"])
def test_public_places(line):
    assert place_findings("f.md", line) == []


@pytest.mark.parametrize(
    ("signature", "n_findings"),
    [
        ("a, b, c, d, e, f, g, h", 0),
        ("self, a, b, c, d, e, f, g, h", 0),
        ("a, b, c, d, e, f, g, h, i", 1),
        ("a, b, /, c, d, *e, f, g, h, **i", 1),
    ],
)
def test_long_signatures_are_found(signature, n_findings):
    assert len(signature_findings("x.py", ast.parse(f"def f({signature}): ..."))) == n_findings
