"""The form of a kernel: the caller's rule, unless the user named another that exists here."""

import types

import jax
import pytest

from saejax.errors import UserError
from saejax.kernels import choice
from saejax.kernels.choice import Form, Operation

SIZES = {"rows": 128, "width": 128, "n": 256}


@pytest.fixture
def device(monkeypatch):
    """Makes jax report a first device of this platform and compute capability."""

    def pretend(platform, capability):
        fake = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind=f"fake {capability}")
        monkeypatch.setattr(jax, "devices", lambda: [fake])

    return pretend


@pytest.mark.parametrize("preferred", [Form.dense, Form.sparse])
def test_the_rule_decides_where_the_user_is_silent(monkeypatch, preferred):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for operation in Operation:
        assert choice.of(operation, preferred, **SIZES) is preferred


def test_the_environment_and_use_override_it(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "dot=dense")
    assert choice.of(Operation.dot, Form.sparse, **SIZES) is Form.dense
    assert choice.of(Operation.decode, Form.sparse, **SIZES) is Form.sparse
    with choice.use("sparse"):
        assert choice.of(Operation.dot, Form.dense, **SIZES) is Form.sparse
    with choice.use(""):  # said to be the rule, whatever the environment says
        assert choice.of(Operation.dot, Form.sparse, **SIZES) is Form.sparse
    assert choice.said() == "dot=dense"


def test_encode_has_no_dense_form():
    with choice.use("dense"):
        assert choice.of(Operation.encode, Form.sparse, **SIZES) is Form.sparse


@pytest.mark.parametrize("text", ["triton", "encode=triton", "product=pallas", "encode=", "=", "encode:pallas"])
def test_what_is_malformed_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="must be one of dense, sparse, screened, pallas") as error, choice.use(text):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("platform", "capability", "encodes", "decodes"),
    [
        ("cpu", "", False, False),
        ("gpu", "8.0", False, False),
        ("gpu", "9.0", True, True),
        ("gpu", "10.0", False, True),  # no Hopper product
        ("gpu", "gfx942", False, False),
    ],
)
def test_pallas_is_refused_where_no_device_runs_it(device, platform, capability, encodes, decodes):
    device(platform, capability)
    for operation in Operation:
        allowed = encodes if operation is Operation.encode else decodes
        with choice.use(f"{operation.name}=pallas"):
            if allowed and choice.mosaic.available():
                dtype = "bfloat16" if operation is Operation.encode else "float32"
                assert choice.of(operation, Form.sparse, **SIZES, dtype=dtype) is Form.pallas
            else:
                with pytest.raises(UserError, match="names pallas"):
                    choice.of(operation, Form.sparse, **SIZES)


def test_sizes_that_no_kernel_takes_keep_the_rule(device):
    device("gpu", "9.0")
    if not choice.mosaic.available():
        pytest.skip("this jax has no Mosaic GPU backend")
    with choice.use("pallas"):
        for wrong in ({"rows": 100}, {"width": 100}, {"n": 100}):
            encode = choice.of(Operation.encode, Form.sparse, **SIZES | wrong, dtype="bfloat16")
            assert encode is Form.sparse
        assert choice.of(Operation.encode, Form.sparse, **SIZES, dtype="float32") is Form.sparse
        assert choice.of(Operation.accumulate, Form.dense, rows=7, width=100, n=9) is Form.dense
        assert choice.of(Operation.accumulate, Form.dense, rows=7, width=384, n=9) is Form.pallas


def test_on_gpu_returns_the_kernel_only_where_it_was_chosen(device):
    device("gpu", "9.0")
    for text in ("", "sparse", "dense", "pallas"):
        with choice.use(text):
            picked = choice.on_gpu(Operation.decode, "kernel", "xla", **SIZES)
        assert picked == ("kernel" if text == "pallas" and choice.mosaic.available() else "xla")
