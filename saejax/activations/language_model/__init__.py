"""Language models to harvest and splice: `load` returns a `LanguageModel`."""

from saejax.activations.language_model.backend import LanguageModel, LMBackend
from saejax.activations.language_model.config import ModelConfig
from saejax.activations.language_model.file_tokenizer import FileTokenizer, tokenizer_of
from saejax.activations.language_model.loading import load, read_config

__all__ = ["FileTokenizer", "LMBackend", "LanguageModel", "ModelConfig", "load", "read_config", "tokenizer_of"]
