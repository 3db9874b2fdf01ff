"""The door to Mosaic GPU: shut where jax has no Pallas, and never opened by importing the kernels."""

import subprocess
import sys

import pytest

from saejax.errors import UserError
from saejax.kernels import choice, mosaic


def test_without_pallas_nothing_is_available_and_asking_for_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas", None)
    assert not mosaic.available()
    with pytest.raises(UserError, match="needs jax with Pallas"):
        choice.check_device(choice.Operation.decode, "pallas")


@pytest.mark.nightly
def test_importing_the_kernels_imports_no_pallas():
    program = "import sys; from saejax.kernels import choice; assert not any('pallas.mosaic' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.parametrize(("n", "expected"), [(4096, 1024), (384, 128), (768, 256), (576, None), (64, None)])
def test_divisor(n, expected):
    assert mosaic.divisor(n, 1024, 128) == expected
