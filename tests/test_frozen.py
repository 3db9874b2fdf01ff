"""What a change of structure must not change (`frozen`): compiled steps, trained numbers, files, help, exports."""

import hashlib

import frozen
import jax
import numpy as np
import pytest

CASES = dict(frozen.cases())
QUICK = [name for name in CASES if name.endswith(("float32 1x1", "float32 2x2"))]
"""In every run of the suite; the others are slow."""


def some(quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.nightly) for name in CASES]


@pytest.mark.parametrize("name", some(QUICK))
def test_the_compiled_step(name):
    """The same StableHLO, so the same program, on the same version of JAX."""
    saved = frozen.read("steps")
    if saved["jax"] != jax.__version__:
        pytest.skip(f"hashes are of jax {saved['jax']}")
    text = frozen.lowered(frozen.made(CASES[name]))
    assert hashlib.sha256(text.encode()).hexdigest() == saved["sha256"][name]


@pytest.mark.parametrize("name", some(["topk float32 1x1", "jumprelu float32 1x1"]))
def test_parameters_after_twenty_steps(name, tmp_path):
    """Norm and projection of every leaf; other processors round differently, by far less than this in 20 steps."""
    saved = frozen.read("parameters")[name]
    found = frozen.trained(frozen.made(CASES[name]), tmp_path / "run")
    assert found.keys() == saved.keys()
    for leaf, values in found.items():
        np.testing.assert_allclose(values, saved[leaf], rtol=1e-3, atol=1e-3 * max(1.0, saved[leaf][0]), err_msg=leaf)


def test_files_and_exports(tmp_path):
    frozen.trained(frozen.made(CASES["topk float32 1x1"]), tmp_path / "run")
    assert frozen.files_of_run(tmp_path / "run") == frozen.read("files")
    assert frozen.exports(tmp_path / "run", tmp_path / "out") == frozen.read("exports")


def test_help(capsys):
    def capture(call):
        call()
        return capsys.readouterr().out

    assert frozen.help_texts(capture) == frozen.read("help")


def test_the_hash_sees_a_change_and_no_name():
    """A hash that names decide would be noise; one that misses an operation would be worthless."""

    def text(f):
        return frozen.canonical(jax.jit(f).lower(np.ones(3, np.float32)).as_text())

    def one(x):
        return {"a": x * 2.0}

    def same(y):
        return {"b": y * 2.0}

    def other(x):
        return {"a": x * 3.0}

    assert text(one) == text(same) != text(other)
