"""saejax: train, judge and share sparse autoencoders in JAX."""

__version__ = "0.1.0"
