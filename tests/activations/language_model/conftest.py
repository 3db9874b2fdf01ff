"""Tiny models of every family with random weights, made by an independent implementation (transformers)."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from tiny_models import MODELS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[pathlib.Path, object]]:
    """A function: name of a row of `MODELS` -> (its saved directory, the torch model)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, tuple[pathlib.Path, object]] = {}

    def make(name: str) -> tuple[pathlib.Path, object]:
        if name not in made:
            config_class, model_class, fields = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
            model = getattr(transformers, model_class)(config).eval()
            with torch.no_grad():  # norm gains and biases start as ones and zeros, which would hide errors
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return make


@pytest.fixture
def tokens() -> np.ndarray:
    """Four rows of 24 tokens, longer than every window."""
    return np.random.default_rng(0).integers(0, 96, (4, 24)).astype(np.int32)
